"""Breaks the sources on purpose, one place at a time: does some test notice?

    python tests/mutations.py [--only=NAME,...] [--jobs=1] [--quick] [--list | --check]

Each mutant is one replaced piece of a copy of the sources, compared by syntax. The
tests named with it run first, until one fails; if all pass, the wider set runs. The
table says which test killed which mutant; the exit status is 1 when one survives
without a reason. --only takes patterns of names or files ("kto*", "*/group.py").
--check runs no test: it names each mutant that no longer fits, and what was renamed in
those that still do. Not collected by pytest: it runs pytest.
"""

import argparse
import ast
import concurrent.futures
import fnmatch
import multiprocessing
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.mutants import MUTANTS, NOT_APPLICABLE  # noqa: E402

COPIED = ("stagecraft", "tests", "experiments", "pyproject.toml")
# What runs when the tests named with a mutant all pass: everything that looks at
# numbers, but for whole runs and pictures.
WIDER = (
    *("tests/losses", "tests/masked_test.py", "tests/mutation_gaps_test.py"),
    *("tests/text", "tests/data", "tests/signals", "tests/models", "tests/stages"),
    *("tests/optim", "tests/run_test.py"),
    *("stagecraft/losses", "stagecraft/data", "stagecraft/masked.py"),
)
SECONDS = 3600  # for one run of tests; more is no verdict
IMPORT = " (import)"  # behind a file of tests that could not be read

# Imported once, then shared by the processes that run the tests.
PRELOADED = [
    *("jax", "jax.numpy", "flax.nnx", "optax", "optax.contrib", "orbax.checkpoint"),
    *("grain", "ml_collections", "sentencepiece", "tensorboardX", "pytest", "numpy"),
]


class _Recorder:
    """A pytest plugin: the first test that failed, and how many ran."""

    def __init__(self):
        self.failed, self.ran = "", 0

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid + IMPORT


def _run_tests(root, arguments, log, found):
    """In a process of its own: pytest on a copy. Sends (failed test or "", tests)."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(root)
    # Only the copy's modules are to be found, whatever imported this file.
    outside = [p for p in sys.path if p and (".venv" in p or not _inside(p, ROOT))]
    sys.path[:] = [str(root), *outside]
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "stagecraft")]:
        del sys.modules[name]
    # Nor do workers that the tests start import this file again, and by it the sources.
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.dont_write_bytecode = True
    import pytest

    recorder = _Recorder()
    code = pytest.main(
        [*arguments, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"],
        plugins=[recorder],
    )
    package = sys.modules.get("stagecraft")
    if package is not None and not _inside(package.__file__, root):
        found.send(("", -1))
    else:
        # Nothing selected (5) is no failure; a broken command line (4) is one of ours.
        found.send((recorder.failed, -1 if code == 4 else recorder.ran))
    found.close()


def _inside(path, folder):
    return Path(path).resolve().is_relative_to(folder)


class Copy:
    """A copy of the sources that mutants are applied to, one after the other."""

    def __init__(self, context, folder):
        self.context, self.root = context, Path(folder) / "copy"
        self.log = Path(folder) / "log"
        self.healthy = {}  # {test: whether it passes on unbroken sources}
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z", *COPIED],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)

    def test(self, arguments):
        """(the first test that failed or "", how many ran); None without a verdict."""
        mine, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_run_tests, args=(self.root, arguments, self.log, theirs)
        )
        process.start()
        theirs.close()
        try:
            if not mine.poll(SECONDS):
                return None
            failed, ran = mine.recv()
        except EOFError:  # the process died
            return None
        finally:
            process.kill()
            process.join()
        if ran < 0:
            told = self.log.read_text(errors="replace")[-2000:]
            raise SystemExit(f"cannot run pytest {' '.join(arguments)}:\n{told}")
        return failed, ran

    def passes(self, test):
        """Whether a test passes on the sources as they are."""
        if test not in self.healthy:
            arguments = [test.removesuffix(IMPORT)]
            arguments += ["--collect-only"] * test.endswith(IMPORT)
            found = self.test(arguments)
            self.healthy[test] = found is not None and not found[0]
        return self.healthy[test]

    def kill(self, mutant, wide=True):
        """(the test that kills a mutant, or ""; seconds).

        Args:
            mutant: a `Mutant`.
            wide: whether the wider set runs when the named tests all pass.
        """
        started = time.perf_counter()
        path = self.root / mutant.file
        sound = path.read_text(encoding="utf-8")
        wider = [name for name in WIDER if (self.root / name).exists()]
        rounds = [shlex.split(mutant.tests)]
        rounds += [[*wider, "-m", "not peers"]] * wide
        named, skipped = rounds[0], []
        while rounds:
            path.write_text(mutant.apply(sound), encoding="utf-8")
            try:
                found = self.test([*rounds[0], "-x", *skipped])
            finally:
                path.write_text(sound, encoding="utf-8")
            if found is None:
                told = f"{mutant.name}: no verdict of {' '.join(rounds.pop(0))}"
                print(told, file=sys.stderr)
                continue
            failed, ran = found
            if not failed:
                if not ran and not skipped and rounds[0] is named:
                    raise SystemExit(f"{mutant.name}: no test is {mutant.tests!r}")
                rounds.pop(0)
                continue
            if self.passes(failed):
                return failed, time.perf_counter() - started
            # It fails on sound sources, too, and so says nothing.
            unread = failed.endswith(IMPORT)
            skip = "--ignore=" if unread else "--deselect="
            skip += failed.removesuffix(IMPORT)
            if skip in skipped:  # named by itself: pytest reads it all the same
                rounds.pop(0)
            skipped.append(skip)
        return "", time.perf_counter() - started


def check():
    """Refuses a table in which some mutant does not fit the sources."""
    wrong, names = [], [m.name for m in MUTANTS]
    wrong += [f"{n}: two mutants of this name" for n in names if names.count(n) > 1]
    for mutant in MUTANTS:
        path = ROOT / mutant.file
        if not path.exists():
            wrong.append(f"{mutant.name}: there is no {mutant.file}")
            continue
        source = path.read_text(encoding="utf-8")
        try:
            ast.parse(mutant.apply(source))
        except SyntaxError as error:
            wrong.append(f"{mutant.name}: with it, {mutant.file} is no Python: {error}")
        except ValueError as error:
            wrong.append(str(error))
        for part in shlex.split(mutant.tests):
            if part.startswith("tests/") and not (ROOT / part).exists():
                wrong.append(f"{mutant.name}: there is no {part}")
    return sorted(set(wrong))


def renamed():
    """One line for each mutant whose variables have other names in the sources."""
    lines = []
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        place = mutant.place(source)
        if place.renamed:
            names = ", ".join(f"{a} is {b}" for a, b in place.renamed.items())
            lines.append(f"{mutant.name}: {mutant.file}:{place.line}: {names}")
    return lines


def row(mutant, killer, seconds):
    """One line of the table."""
    told = killer or ("SURVIVES: " + (mutant.survives or "no test notices"))
    return f"{mutant.name:44} {mutant.file:38} {seconds:5.0f} s  {told}"


def run(mutants, jobs, wide=True):
    """Applies mutants, prints a line for each; returns {name: killing test or ""}."""
    scratch = Path(tempfile.mkdtemp(prefix="mutations-"))
    # Most programs are those of the sound sources, which the tests have compiled, too.
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "compiled")
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    copies = queue.Queue()
    for number in range(jobs):
        copies.put(Copy(context, scratch / str(number)))

    def work(mutant):
        copy = copies.get()
        try:
            return copy.kill(mutant, wide)
        finally:
            copies.put(copy)

    found = {}
    try:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            pending = {pool.submit(work, m): m for m in mutants}
            for future in concurrent.futures.as_completed(pending):
                mutant, (killer, seconds) = pending[future], future.result()
                found[mutant.name] = killer
                print(row(mutant, killer, seconds), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="*", help="names, files or patterns of them, with commas"
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once")
    parser.add_argument(
        "--quick", action="store_true", help="only the tests named with each mutant"
    )
    parser.add_argument("--list", action="store_true", help="only name them")
    parser.add_argument(
        "--check", action="store_true", help="only see whether all fit the sources"
    )
    options = parser.parse_args(argv)
    wrong = check()
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    if options.check:
        print("\n".join([*renamed(), f"all {len(MUTANTS)} mutants fit"]))
        return 0
    patterns = options.only.split(",")
    mutants = [
        m
        for m in MUTANTS
        if any(fnmatch.fnmatch(n, p) for p in patterns for n in (m.name, m.file))
    ]
    if not mutants:
        print(f"--only={options.only}: no mutant of this name", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{m.name:44} {m.file:38} {m.tests}" for m in mutants))
    else:
        found = run(mutants, max(options.jobs, 1), not options.quick)
        killed = sum(map(bool, found.values()))
        print(f"\n{killed} of {len(found)} mutants killed")
        excused = [m for m in mutants if not found[m.name] and m.survives]
        for mutant in excused:
            print(f"  {mutant.name} survives: {mutant.survives}")
    for name, reason in NOT_APPLICABLE.items():
        print(f"  not applicable: {name}: {reason}")
    return 0 if options.list or killed + len(excused) == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
