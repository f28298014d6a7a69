"""The scorecard: what the project promises, how often it was tried, and whether it held.

    python -m tests.scorecard                      all lines, and the table in docs/RELIABILITY.md (two hours or so on two cores)
    python -m tests.scorecard --only F1 F2 R1      some lines; the other lines of the table stay as they are
    python -m tests.scorecard --quick              one quick test on each line's subject, in under a minute: does the command work?

A line is a set of tests and a number of tries. A test counts as one try, or as many as it records ("tried"). The line has passed if every
one of its tests passed, none was skipped, and the tries reach the number. docs/scorecard.json holds what the table shows.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, RESULTS, README = ROOT / "docs/RELIABILITY.md", ROOT / "docs/scorecard.json", ROOT / "README.md"
RESUME, CHECKPOINT, SAFETY, RUN, PARALLEL, OPENING = (f"tests/engine/test_{name}.py" for name in (
    "resume", "checkpoint", "safety", "run", "parallel", "opening"))


@dataclass
class Line:
    name: str
    promise: str
    target: int  # tries
    tests: str  # file, file::function (with all its parameters) or file::function[parameter]; more than one between spaces
    quick: str = ""  # the test that --quick runs; default: the first of the tests
    at_most: dict | None = None  # largest values of what the tests record besides; such a line runs alone, without a second process
    note: str = ""


@dataclass
class Elsewhere:
    name: str
    promise: str
    why: str


LINES = [
    Line("C1", "logits of random configurations are transformers' (float32 1e-5, float64 1e-10), six families", 1200,
         "tests/test_model.py::test_logits_equal_transformers tests/test_model.py::test_logits_equal_transformers_on_many_more",
         quick="tests/test_model.py::test_rotary_angles_by_hand"),
    Line("C2", "a published model's logits are those of an independent reading and of transformers", 1,
         "tests/test_stories260K.py::test_the_published_model_in_transformers", quick="tests/test_stories260K.py::test_what_is_refused",
         note="stories260K; gpt2 and pythia need a network"),
    Line("C3", "an exported folder is read by transformers: the same weights bit for bit, the same logits", 30,
         "tests/test_weights.py::test_round_trip_is_bitwise tests/test_weights.py::test_config_survives_the_trip "
         "tests/test_weights.py::test_our_own_tiny_model_runs_in_transformers tests/test_weights.py::test_shards_load_like_one_file",
         quick="tests/test_weights.py::test_export_does_not_touch_the_model"),
    Line("C4", "a completion is the same alone and in random batches; log-probs are those of a full forward pass", 500,
         "tests/test_sample.py::test_a_row_is_the_same_in_500_random_schedules tests/test_sample.py::test_old_logps_equal_token_logps "
         "tests/test_model.py::test_cache_equals_full_forward", quick="tests/test_model.py::test_cache_equals_full_forward"),
    Line("C5", "padding changes no result", 8, "tests/test_model.py::test_right_padding_changes_no_real_position "
         "tests/methods/test_grpo.py::test_padding_and_order_do_not_matter tests/methods/test_ppo.py::test_padding_and_order_do_not_matter "
         "tests/test_rewards.py::test_padding_may_be_anything", quick="tests/test_rewards.py::test_padding_may_be_anything",
         note="on the right; nothing pads on the left"),
    Line("C6", "on-policy methods begin at ratio 1 and KL 0, and their gradients agree there", 20, "tests/methods/test_identities.py",
         quick="tests/methods/test_identities.py::test_a_log_prob_that_moved_is_noticed"),
    Line("C7", "micro-batches, recomputed activations and two processes change nothing (float64 1e-10), every method", 22,
         f"{RESUME}::test_accumulation_is_invariant {PARALLEL}::test_two_processes_equal_one "
         f"{PARALLEL}::test_two_processes_equal_one_for_every_other_method "
         "tests/test_model.py::test_activation_checkpointing_changes_memory_alone",
         quick="tests/test_model.py::test_activation_checkpointing_changes_memory_alone"),
    Line("C8", "each loss is its formula written again in plain numbers; gradients by differences", 21_000,
         "tests/methods/test_losses.py::test_values_and_gradients_are_those_of_the_formula "
         "tests/methods/test_losses.py::test_a_thousand_more_of_each", quick="tests/methods/test_dpo.py::test_worked_numbers"),
    Line("C9", "every method rests on its closed form, exactly and by sampling; the lake's policies too", 85,
         "tests/toy/test_three_actions.py::test_every_row_meets_its_law tests/toy/test_three_actions.py::test_other_settings "
         "tests/toy/test_three_actions.py::test_ten_seeds_of_what_is_sampled "
         "tests/toy/test_tiny_language.py::test_each_method_rests_on_its_law "
         "tests/toy/test_tiny_language.py::test_seeds_of_every_method_land_on_their_law "
         "tests/toy/test_frozen_lake.py::test_soft_value_iteration_against_all_trajectories "
         "tests/toy/test_frozen_lake.py::test_inverse_rl_is_at_the_maximum_of_the_likelihood",
         quick="tests/toy/test_closed_form.py::test_rounds"),
    Line("C10", "log-prob kernels and bodies against float64, forward and backward (on a CPU in Triton's interpreter)", 150,
         "tests/kernels/test_logprob.py tests/kernels/test_linear_logprob.py",
         quick="tests/kernels/test_linear_logprob.py::test_log_probs_are_never_above_zero"),
    Line("C11", "mistakes made on purpose, one at a time: the default tests notice each", 480, "tests/test_wrong_variants.py",
         quick="tests/test_wrong_variants.py::test_the_table_of_mutants_fits_the_files"),
    Line("F1", "kill -9 at random moments: the resumed run is the unbroken one bit for bit", 200,
         f"{RESUME}::test_kill_9_at_random_moments",
         quick=f"{CHECKPOINT}::test_round_trip_is_bitwise"),
    Line("F2", "kill -9 before every change of the disk while a checkpoint is written", 13,
         f"{CHECKPOINT}::test_kill_between_any_two_writes",
         quick=f"{CHECKPOINT}::test_keeps_the_newest_and_sweeps_up"),
    Line("F3", "a full disk: one sentence, the old checkpoint is intact, the run goes on when there is room", 50,
         f"{SAFETY}::test_a_full_disk_is_one_sentence_and_the_run_can_go_on {CHECKPOINT}::test_full_disk",
         quick=f"{CHECKPOINT}::test_full_disk"),
    Line("F4", "one failing write (EIO) of any kind: one warning, and the run goes on", 20,
         f"{SAFETY}::test_one_failing_write_does_not_end_a_run {CHECKPOINT}::test_one_stumble_is_retried",
         quick=f"{CHECKPOINT}::test_one_stumble_is_retried"),
    Line("F5", "SIGTERM and Ctrl-C at random moments, in steps, rewards, evaluations: exit 0, saved, bitwise", 100,
         f"{RESUME}::test_sigterm_at_random_moments {RESUME}::test_a_signal_does_not_wait_for_a_slow_reward "
         f"{RESUME}::test_sigterm_then_resume_is_bitwise", quick=f"{RUN}::test_two_bad_steps_then_a_good_one_go_on"),
    Line("F6", "cut weights and flipped bits, in files of others and in our checkpoints: refused", 1064,
         f"tests/test_weights.py::test_truncated_weights_are_always_refused {CHECKPOINT}::test_damage_is_noticed_and_stepped_over "
         "tests/test_weights.py::test_flipped_bits_in_the_header_are_refused",
         quick=f"{CHECKPOINT}::test_a_damaged_folder_of_the_same_step_is_replaced"),
    Line("F7", "hostile safetensors: accepted or refused exactly as by the official reader", 10_000,
         "tests/test_weights.py::test_hostile_files_are_refused_at_once tests/test_weights.py::test_exchanged_header_entries_are_refused "
         "tests/test_weights.py::test_ten_thousand_damaged_headers tests/test_fuzz.py::test_many_rounds[safetensors]",
         quick="tests/test_weights.py::test_the_pattern_of_the_hostile_files_is_sound"),
    Line("F8", "pickles: never executed", 20,
         "tests/test_weights.py::test_pickles_are_refused_and_never_executed tests/test_weights.py::test_the_payload_is_live "
         f"tests/test_weights.py::test_a_pickle_under_another_name_is_never_executed {CHECKPOINT}::test_no_pickle_in_the_folder "
         "tests/test_weights.py::test_index_may_name_only_safetensors_of_its_folder",
         quick="tests/test_weights.py::test_the_payload_is_live"),
    Line("F9", "chat templates: no escape, bounded in time and memory", 300,
         f"{SAFETY}::test_a_template_that_takes_all_time_or_memory_is_refused tests/test_fuzz.py::test_many_rounds[templates]",
         quick="tests/test_tokenizer.py::test_a_template_may_refuse_with_its_own_words"),
    Line("F10", "damaged JSONL, JSON, gz and parquet: path:line and the reason, no row is dropped silently", 10_000,
         "tests/test_data.py::test_damaged_files_are_refused_or_read_never_worse tests/test_data.py::test_many_more_damaged_files "
         "tests/test_fuzz.py::test_many_rounds[parquet]", quick="tests/test_data.py::test_arrow_nulls_are_absent_fields"),
    Line("F11", "tokenizers and configs that do not fit: refused with both numbers; padding ids are never sampled", 1_000_000,
         "tests/test_sample.py::test_padding_rows_of_the_vocabulary_are_never_sampled "
         f"{RUN}::test_a_tokenizer_too_large_for_the_policy tests/test_weights.py::test_a_tokenizer_may_have_more_ids_than_the_model "
         "tests/test_fuzz.py::test_many_rounds[tokenizers] tests/test_fuzz.py::test_many_rounds[configs] "
         "tests/test_fuzz.py::test_many_rounds[adapters]", quick=f"{RUN}::test_a_tokenizer_too_large_for_the_policy"),
    Line("F12", "NaN in a loss, a gradient or a reward, and rewards that fail: the step is skipped and named, then the run stops", 140,
         f"{RUN}::test_a_step_that_is_not_finite_is_skipped_and_named {RUN}::test_three_bad_steps_end_the_run_and_the_checkpoint_is_finite "
         "tests/test_fuzz.py::test_many_rounds[rewards] tests/test_rewards.py::test_ask_refuses_and_names_the_guilty_row",
         quick=f"{RUN}::test_a_skipped_step_leaves_the_weights_alone"),
    Line("F13", "too little memory: one sentence with the flag that helps, and the numbers stay the same", 10,
         f"{SAFETY}::test_too_little_memory_names_the_flag_that_helps tests/test_sample.py::test_a_pass_without_memory_is_halved",
         quick="tests/test_sample.py::test_a_pass_without_memory_is_halved"),
    Line("F14", "odd rows: empty answers, one row, equal rewards, a prompt that fills the row, max_new 1; every method", 100,
         f"{RUN}::test_odd_rows_train_or_are_refused_in_a_sentence",
         quick=f"{RUN}::test_first_look_says_what_was_cut_and_what_ends_twice"),
    Line("F15", "a process of two is killed: all end within 30 s; uneven rows, failing rewards; resumed bit for bit", 20,
         f"{PARALLEL}::test_a_killed_process_ends_all_and_a_stopped_run_goes_on "
         f"{PARALLEL}::test_rows_that_do_not_divide_evenly_are_computed_once_or_twice "
         f"{PARALLEL}::test_a_reward_that_fails_in_one_process_skips_the_step_in_all",
         quick=f"{PARALLEL}::test_shares_cover_all_rows_once"),
    Line("F16", "a disk that is too small, a folder that another process writes or has left, a clock that jumps", 8,
         f"{RUN}::test_a_disk_too_small_for_checkpoints {OPENING}::test_two_runs_in_one_second_have_two_folders "
         f"{SAFETY}::test_a_second_process_is_refused_with_the_first_ones_number {SAFETY}::test_a_lock_is_kept_until_the_process_ends "
         f"{SAFETY}::test_what_killed_processes_left_half_written_is_swept {RUN}::test_a_clock_that_jumps_back_changes_nothing "
         f"{RUN}::test_a_run_refused_before_step_1_may_be_repeated {OPENING}::test_two_processes_train_one_base",
         quick=f"{OPENING}::test_two_runs_in_one_second_have_two_folders"),
    Line("F17", "run folders of an earlier version resume", 3, "tests/engine/test_older_runs.py",
         quick=f"{RUN}::test_a_run_of_an_older_version_gets_the_defaults_of_newer_flags"),
    Line("R1", "a run cut at random moments, in epochs and micro-batches, is the unbroken one; 10 times each method", 200,
         f"{RESUME}::test_kill_9_at_random_moments {RESUME}::test_sigterm_at_random_moments {RESUME}::test_sigterm_then_resume_is_bitwise "
         f"{RESUME}::test_dying_in_the_middle_of_accumulation {RESUME}::test_dying_in_an_evaluation "
         f"{RESUME}::test_a_cut_after_each_step_of_a_run_in_rounds", quick=f"{CHECKPOINT}::test_steps_are_compared_as_numbers"),
    Elsewhere("R2", "the same on a GPU with --deterministic", "needs a GPU: python -m pytest -m gpu"),
    Line("R3", "the same seed twice is the same run", 1, f"{RESUME}::test_the_same_seed_twice_is_the_same_run_and_another_is_not"),
    Line("R4", "resumed with another number of processes: the same rows, the loss to rounding", 4,
         f"{PARALLEL}::test_resume_with_another_number_of_processes {PARALLEL}::test_two_processes_equal_one",
         quick=f"{PARALLEL}::test_alone_nothing_is_done"),
    Line("R5", "logging, evaluating and saving change no bit of the training, every method", 20,
         f"{RESUME}::test_logging_evaluating_and_saving_do_not_change_the_training",
         quick="tests/engine/test_common.py::test_batch_rows_leave_the_global_generator_alone"),
    Line("L1", "10,000 steps with kills: memory grows by less than 5 %, open files by none, bit for bit", 10_000,
         f"{RESUME}::test_ten_thousand_steps", quick="tests/engine/test_tracking.py::test_memory_is_the_largest_resident_size"),
    Line("L2", "a million rows of JSONL: less than 500 MB, first step within 5 s of the start", 1,
         "tests/engine/test_long_files.py::test_a_million_rows_take_less_than_500_mb", at_most={"megabytes": 500, "seconds": 5},
         quick="tests/engine/test_long_files.py::test_lines_start_where_they_do"),
    Line("L3", "10,000 requests of 1 to 1,024 tokens: each answered once, log-probs right, no memory kept", 10_000,
         "tests/test_sample.py::test_ten_thousand_requests_of_any_length",
         quick="tests/test_sample.py::test_one_prefill_a_prompt_and_finished_rows_leave"),
    Elsewhere("L4", "a day of PPO on a GPU: no NaN, memory flat", "needs a GPU for a day"),
    Line("L5", "random command lines: exit code 0, 1 (diverged) or 2 with one sentence, no traceback", 500,
         "tests/test_fuzz.py::test_many_rounds[command_lines] tests/test_fuzz.py::test_these_command_lines_are_answered_in_one_sentence",
         quick="tests/test_front_door.py::test_mistyped_flag_and_command"),
    Line("L6", "bad inputs in all (F6, F7, F10, F14, L5 and the run folders): no traceback, none accepted silently", 13_500,
         "tests/test_fuzz.py::test_many_rounds[run_folders]", quick="tests/test_fuzz.py::test_what_a_template_raises_is_one_sentence"),
    Elsewhere("L7", "macOS and Windows, Python 3.11 to 3.14, oldest and newest torch",
              "needs other systems; all of the above is Linux, one Python and one torch"),
    Line("L8", "`make test` takes under 5 minutes on two cores and fails in none of 20 runs", 20, "",
         quick="tests/test_readme.py::test_no_line_scrolls_sideways"),
]
SUMMED = {"L6": ("F6", "F7", "F10", "F14", "L5")}  # a line that counts the tries of others too


def run_tests(tests, alone):
    """{node id: (passed, {what it recorded})} of the tests, whatever their markers. alone: one process after the other."""
    with tempfile.TemporaryDirectory() as folder:
        report, found = Path(folder) / "report.xml", {}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", f"--junitxml={report}", "--tb=short", *tests]
        subprocess.run(command if alone else [*command, "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"], cwd=ROOT)
        if not report.is_file():
            return found
        for case in ElementTree.parse(report).iter("testcase"):
            bad = {child.tag for child in case} & {"failure", "error", "skipped"}
            recorded = {item.get("name"): float(item.get("value")) for item in case.iter("property")}
            found[f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"] = (not bad, recorded)
        return found


def belongs(node, tests):
    return any(node == test or node.startswith(f"{test}[") or "::" not in test and node.startswith(f"{test}::") for test in tests.split())


def judge(line, found):
    """{'passed', 'tried', and what was recorded besides} of a line, from the outcomes of its tests."""
    mine = {node: outcome for node, outcome in found.items() if belongs(node, line.tests)}
    complete = all(any(belongs(node, test) for node in mine) for test in line.tests.split())
    tried = sum(int(recorded.get("tried", 1)) for passed, recorded in mine.values() if passed)
    beside = {name: max((recorded[name] for _, recorded in mine.values() if name in recorded), default=math.inf)
              for name in line.at_most or {}}
    within = all(value <= line.at_most[name] for name, value in beside.items())
    return {"passed": complete and within and all(passed for passed, _ in mine.values()), "tried": tried, **beside}


def flakes(runs):
    """L8: `make test` so many times. The longest may take 5 minutes."""
    seconds, failed = [], 0
    for number in range(runs):
        began = time.monotonic()
        done = subprocess.run(["make", "test"], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.monotonic() - began)
        failed += done.returncode != 0
        print(f"make test, run {number + 1} of {runs}: {'failed' if done.returncode else 'passed'} in {seconds[-1]:.0f} s", flush=True)
        if done.returncode:
            print("\n".join(done.stdout.splitlines()[-15:]))
    return {"passed": not failed and max(seconds) < 300, "tried": runs, "failed": failed, "seconds": round(max(seconds))}


def table(results):
    """The lines in markdown."""
    rows = ["| line | what must hold | tries: got / asked | held |", "| --- | --- | --- | --- |"]
    for line in LINES:
        got = results.get(line.name)
        if isinstance(line, Elsewhere):
            rows.append(f"| {line.name} | {line.promise} | | not run: {line.why} |")
            continue
        more = "".join(f", {name} {got[name]:g}" for name in ("megabytes", "seconds", "failed") if got and name in got)
        note = f" ({line.note})" if line.note else ""
        held = "not run" if not got else "yes" if got["passed"] else "**no**"
        rows.append(f"| {line.name} | {line.promise}{note} | {got['tried'] if got else 0:,} / {line.target:,}{more} | {held} |")
    return "\n".join(rows)


def score(results):
    """'38 of 38 lines of the [scorecard](…) hold', for README, and how many have not been tried."""
    lines = [line.name for line in LINES if isinstance(line, Line)]
    passed, untried = sum(results.get(name, {}).get("passed", False) for name in lines), len({*lines} - results.keys())
    return f"{passed} of {len(lines)} lines of the [scorecard]({LINK}) hold{f', {untried} not tried yet' * bool(untried)}"


def summary(results):
    """The same for the page, with date, commit and machine."""
    dates, commits = ({result[key] for result in results.values()} for key in ("date", "commit"))
    when = min(dates) if len(dates) == 1 else f"{min(dates)} to {max(dates)}"
    where = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    others = sum(isinstance(line, Elsewhere) for line in LINES)
    return (f"{score(results).replace(f' of the [scorecard]({LINK})', '')} ({when}, commit {', '.join(sorted(commits))}; {where}). "
            f"{others} further lines need other machines.")


LINK = "docs/RELIABILITY.md#the-scorecard"


def write_page(results):
    """Put the table into docs/RELIABILITY.md and the number into README."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- scorecard -->\n", "\n<!-- end of the scorecard -->"
    head, _, rest = page.partition(begin)
    PAGE.write_text(f"{head}{begin}{summary(results)}\n\n{table(results)}{end}{rest.partition(end)[2]}", encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    README.write_text(re.sub(r"\d+ of \d+ lines of the \[scorecard\][^.]*\.[^.]*(?=\.)", score(results), readme), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one quick test on each subject: does this command work?")
    parser.add_argument("--only", nargs="+", metavar="LINE", help="only these lines; the others of the table stay as they are")
    parser.add_argument("--runs", type=int, default=20, help="how often L8 runs `make test`")
    asked = parser.parse_args()
    lines = [line for line in LINES if isinstance(line, Line)]
    if unknown := {*(asked.only or ())} - {line.name for line in lines}:
        parser.error(f"{sorted(unknown)[0]}: no such line, or one that this machine cannot run; the lines are "
                     f"{', '.join(line.name for line in lines)}")
    if asked.quick:
        tests = sorted({line.quick or line.tests.split()[0] for line in lines})
        found = run_tests(tests, alone=True)
        failed = [node for node, (passed, _) in found.items() if not passed]
        failed += [test for test in tests if not any(belongs(node, test) for node in found)]
        print(f"{len(lines)} lines, one quick test each: {len(found) - len(failed)} of {len(found)} passed {' '.join(failed)}")
        return bool(failed)
    began, chosen = time.monotonic(), [line for line in lines if not asked.only or line.name in asked.only]
    found = {}
    for alone in (False, True):
        tests = dict.fromkeys(test for line in chosen if bool(line.at_most) == alone for test in line.tests.split())
        found |= run_tests(tests, alone) if tests else {}
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for line in chosen:
        got = judge(line, found) if line.tests else flakes(asked.runs)
        got["tried"] += sum(results.get(name, {}).get("tried", 0) for name in SUMMED.get(line.name, ()))
        got["passed"] &= got["tried"] >= line.target and all(results.get(name, {}).get("passed") for name in SUMMED.get(line.name, ()))
        results[line.name] = got | {"date": time.strftime("%Y-%m-%d"), "commit": commit}
        print(f"{line.name:4} {'held' if got['passed'] else 'DID NOT HOLD':12} {got['tried']:>9,} of {line.target:,} tries  {line.promise}")
    results = {line.name: results[line.name] for line in lines if line.name in results}
    write_page(results)
    print(f"{summary(results)} This took {(time.monotonic() - began) / 60:.0f} min.")
    return not all(results[line.name]["passed"] for line in chosen)


if __name__ == "__main__":
    sys.exit(main())
