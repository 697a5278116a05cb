"""Mistakes in what an object store holds, and when."""

from tests.mutants.mutant import in_file

_TESTS = "tests/stores_test.py"

MUTANTS = (
    *in_file(
        "stagecraft/stores.py",
        _TESTS,
        (
            "half a folder is a folder",
            'self.store.pipe_file(mark, b" ")',
            "mark",
            f"{_TESTS} -k not_whole",
        ),
        (
            "a copy overwrites what is there",
            "self.store.put_file(str(self.folder / name), partial)\n"
            "os.replace(partial, key)",
            "self.store.put_file(str(self.folder / name), key)",
            f"{_TESTS} -k halfway",
        ),
        (
            "the newest is copied first",
            "sorted(changed, key=lambda name: here[name][1])",
            "sorted(changed, key=lambda name: -here[name][1])",
            f"{_TESTS} -k oldest",
        ),
        (
            "what is removed stays",
            "self.store.rm_file(self._key(name))",
            "self._key(name)",
            f"{_TESTS} -k removed",
        ),
        (
            "what is half done is copied",
            'not name.startswith(".") and not name.endswith(".work")',
            'not name.endswith(".work")',
            f"{_TESTS} -k half_done",
        ),
        (
            "checkpoints are read too",
            "folders.pop(name, None)",
            "name",
            f"{_TESTS} -k events",
        ),
        (
            "others read all again",
            "self._digest(n) != d",
            "d",
            f"{_TESTS} -k follow",
        ),
        (
            "lines wait for the next file",
            "timer.start()",
            "timer",
            f"{_TESTS} -k lines",
        ),
    ),
)
