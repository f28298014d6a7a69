"""The toys: small problems whose right answer is known exactly. They test every method's own loss against it."""
