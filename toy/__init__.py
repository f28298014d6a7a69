"""The proofs: small worlds in which the right answer is known exactly, and every method's own loss is held to it."""
