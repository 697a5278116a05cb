"""Work directories on object stores: gs://, s3://, or a mounted bucket (file://).

A store can neither append to a file nor rename a folder, and most of what reads and
writes a run needs files of this machine. So a command works in a folder of its own, the
mirror, which is filled when it begins and dropped when it ends. What is written whole
is copied to the store before the call returns, and lines that are appended within
`SOON` seconds, the oldest first. Checkpoints are not in the mirror: Orbax reads and
writes them at the store, each process its shards.

Of several processes each has a mirror. Process 0 writes to the store; at a barrier the
others bring theirs up to what its mirror holds.
"""

import atexit
import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from stagecraft import process
from stagecraft.errors import UserError, install

STORES = ("gs", "s3", "file")  # file: a bucket that is mounted, or a test's
SOON = 10  # seconds within which a line that was appended is at the store
REACHING = 20  # seconds until a store that does not answer is given up
# Folders that Orbax reads and writes at the store itself.
DIRECT = ("checkpoints", "unconcluded")
_PARTIAL = ".partial"  # an object in a folder that is not yet there as a whole
_log = logging.getLogger("stagecraft")
_mirrors: list["_Mirror"] = []


def local(root: str | Path, *, writing: bool = False, refresh: bool = True) -> Path:
    """Returns the folder in which this process finds the files of a work directory.

    Args:
        root: a folder, which is returned; or an address, whose mirror is made where
            this process has none.
        writing: whether to refuse, at once, a store that takes no files.
        refresh: whether to bring a mirror that is there up to date.

    Raises:
        UserError: the store cannot be reached, read or written.
    """
    if "://" not in str(root):
        if writing and (mirror := _mirror_of(root)):
            mirror.try_writing()
        return Path(root)
    scheme, _, path = str(root).partition("://")
    if scheme not in STORES or not path.strip("/"):
        raise UserError(
            f"--workdir={root}: expected a folder, or an address as gs://BUCKET/PATH, "
            "s3://BUCKET/PATH or file:///PATH"
        )
    address = str(root).rstrip("/")
    mirror = next((m for m in _mirrors if m.address == address), None)
    if mirror is None:
        mirror = _Mirror(address)
        mirror.refresh()
        _mirrors.append(mirror)
    elif refresh:
        mirror.push()
        mirror.refresh()
    if writing:
        mirror.try_writing()
    return mirror.folder


def place(path: str | Path):
    """Returns where Orbax reads and writes a folder, an `etils.epath.Path`."""
    from etils import epath

    path = Path(path).absolute()
    return epath.Path(mirror.at(path) if (mirror := _mirror_of(path)) else path)


def key_values(path) -> str | dict[str, Any]:
    """Returns the key-value store of a folder, as TensorStore takes it.

    Args:
        path: what `place` returned, or a path below it.
    """
    scheme, _, rest = str(path).partition("://")
    bucket, _, inner = rest.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": f"{inner}/"}
    if scheme != "s3":
        return f"file://{path}/"
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{inner}/"}
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    if endpoint := next(filter(None, map(os.environ.get, names)), ""):
        spec["endpoint"] = endpoint
    names = ("AWS_REGION", "AWS_DEFAULT_REGION")
    region = next(filter(None, map(os.environ.get, names)), "")
    if region or endpoint:
        spec["aws_region"] = region or "us-east-1"
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # The other places where credentials may lie are not looked into, nor missed.
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def named(text: Any) -> str:
    """Returns a text with the address of a work directory in place of its mirror."""
    text = str(text)
    for mirror in _mirrors:
        text = text.replace(str(mirror.folder), mirror.address)
    return text


def push(path: str | Path, *, whole: bool = False) -> None:
    """Copies what changed beside a file or folder to the store, the oldest first.

    Does nothing for what lies in no mirror.

    Args:
        path: a path in a work directory; all of its files are looked at.
        whole: whether `path` is a folder that must appear whole or not at all.
    """
    if mirror := _mirror_of(path):
        mirror.push(Path(path).absolute() if whole else None)


def push_soon(path: str | Path) -> None:
    """Copies a file that was appended to, within `SOON` seconds."""
    if process.is_first() and (mirror := _mirror_of(path)):
        mirror.push_soon(Path(path).absolute())


def seen(path: Path) -> bool:
    """Returns whether a file is there: at the store, where it lies on one."""
    mirror = _mirror_of(path)
    return mirror.has(path) if mirror else path.exists()


def shared() -> dict[str, dict[str, str]]:
    """Copies what changed to the stores; returns what others bring up to date by."""
    for mirror in _mirrors:
        mirror.push()
    return {mirror.address: mirror.digests() for mirror in _mirrors}


def follow(state: dict[str, dict[str, str]]) -> None:
    """Brings this process's mirrors up to what `shared` returned in process 0."""
    for mirror in _mirrors:
        mirror.follow(state.get(mirror.address, {}))


def mirrored() -> bool:
    """Returns whether this process works on an object store."""
    return bool(_mirrors)


def file_system(address: str, **options):
    """Returns the fsspec file system of an address, and the path in it.

    Args:
        address: SCHEME://PATH.
        **options: of that file system.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        line = " ".join(str(error).split())
        ours = address.partition("://")[0] in ("gs", "gcs", "s3")
        remedy = f": {install('stores')}" if ours else ""
        raise UserError(f"{address}: {line}{remedy}") from None
    except ValueError as error:
        raise UserError(f"{address}: not a known storage ({error})") from None


def _mirror_of(path):
    if not _mirrors:
        return None
    path = Path(path).absolute()
    return next((m for m in _mirrors if path.is_relative_to(m.folder)), None)


class _Mirror:
    """The folder in which this process works on a work directory at an object store.

    Only process 0 writes to the store. A file counts as changed when its size or time
    differs from when both sides were the same.

    Args:
        address: SCHEME://BUCKET/PATH.
    """

    def __init__(self, address):
        from fsspec import config

        # A listing that is remembered hides what other processes wrote.
        for name in ("gs", "gcs", "s3"):
            config.conf.setdefault(name, {})["use_listings_cache"] = False
        logging.getLogger("gcsfs").setLevel(logging.ERROR)
        self.address = address
        self.mounted = address.startswith("file://")
        folders = {"auto_mkdir": True} if self.mounted else {}
        self.store, self.base = file_system(address, **folders)
        self.folder = _scratch() / address.rpartition("/")[2]
        self.folder.mkdir()
        self._same = {}  # {name: (size, time)} of files that both sides have alike
        self._versions = {}  # {name: version at the store} of those that were read
        self._digests = {}  # {name: ((size, time), digest)}
        self._lock, self._due, self._took = threading.RLock(), {}, 0.0

    def at(self, path):
        """Returns the address of a path in the mirror; a path where it is mounted."""
        inner = path.relative_to(self.folder).as_posix()
        return f"{self.base if self.mounted else self.address}/{inner}"

    def has(self, path):
        """Returns whether the store holds a file."""
        with self._speaking("read"):
            return self.store.exists(self._key(path.relative_to(self.folder)))

    def try_writing(self):
        """Writes and removes an object, so that what is not allowed is said at once."""
        if process.is_first():
            key = self._key(f".writable-{os.urandom(8).hex()}")
            with self._speaking("write"):
                self._within(lambda: self.store.pipe_file(key, b" "))
                self._within(lambda: self.store.rm_file(key))

    def refresh(self):
        """Reads what the store holds and the mirror has not, or has otherwise."""
        with self._lock, self._speaking("read"):
            there = self._within(self._listed)
            read = [n for n, v in there.items() if self._versions.get(n) != v]
            self._fetch(read)
            self._versions = there
            self._drop(filter(_is_read, self._same.keys() - there.keys()))

    def _listed(self):
        """Returns {name: version} of the objects that belong into the mirror."""
        versions, partial = {}, []
        try:
            for _, folders, files in self.store.walk(
                self.base, detail=True, on_error="raise"
            ):
                for name in DIRECT:
                    folders.pop(name, None)
                for name, info in files.items():
                    inner = info["name"].removeprefix(f"{self.base}/")
                    if name == _PARTIAL:
                        partial.append(inner.removesuffix(_PARTIAL))
                    elif _is_read(name):
                        keys = ("ETag", "etag", "md5Hash", "mtime")
                        versions[inner] = [info["size"], *map(info.get, keys)]
        except FileNotFoundError:
            return {}
        whole = [n for n in versions if not n.startswith((*partial,) or ("//",))]
        return {name: versions[name] for name in whole}

    def _fetch(self, names):
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        if names:
            targets = [str(self.folder / name) for name in names]
            self.store.get([self._key(name) for name in names], targets)
        for name in names:
            self._same[name] = _stamp(self.folder / name)

    def _drop(self, names):
        for name in [*names]:
            (self.folder / name).unlink(missing_ok=True)
            self._same.pop(name, None)

    def push(self, whole=None):
        """Copies what changed to the store, in the order in which it was written.

        Args:
            whole: a folder that is made whole first, and marked until it is.
        """
        if not process.is_first():
            return
        with self._lock, self._speaking("write"):
            here = self._here()
            changed = [n for n, stamp in here.items() if self._same.get(n) != stamp]
            if whole is not None:
                self._push_whole(whole.relative_to(self.folder).as_posix(), here)
                changed = [n for n in changed if self._same.get(n) != here[n]]
            for name in sorted(changed, key=lambda name: here[name][1]):
                self._send(name, here[name])
            for name in [n for n in self._same if n not in here]:
                with contextlib.suppress(FileNotFoundError):
                    self.store.rm_file(self._key(name))
                del self._same[name]

    def _push_whole(self, folder, here):
        mark = self._key(f"{folder}/{_PARTIAL}")
        inside = [name for name in here if name.startswith(f"{folder}/")]
        keys = [self._key(name) for name in inside]
        self.store.pipe_file(mark, b" ")
        self.store.put([str(self.folder / name) for name in inside], keys)
        for key in {*self.store.find(self._key(folder))} - {*keys, mark}:
            self.store.rm_file(key)
        self.store.rm_file(mark)
        self._same |= {name: here[name] for name in inside}

    def _send(self, name, stamp):
        began = time.monotonic()
        key = self._key(name)
        if self.mounted:  # an upload shows nothing until it is whole, a copy does
            folder, _, last = key.rpartition("/")
            partial = f"{folder}/.{last}{_PARTIAL}"
            self.store.put_file(str(self.folder / name), partial)
            os.replace(partial, key)
        else:
            self.store.put_file(str(self.folder / name), key)
        self._same[name], self._took = stamp, time.monotonic() - began

    def push_soon(self, path):
        """Copies a file in a while; what is appended until then goes with it."""
        name = path.relative_to(self.folder).as_posix()
        with self._lock:
            if name in self._due:
                return
            # A large file is copied so seldom that it takes no more than a twentieth.
            timer = threading.Timer(max(SOON, 20 * self._took), self._late, (name,))
            timer.daemon = True
            self._due[name] = timer
        timer.start()

    def _late(self, name):
        with self._lock:
            del self._due[name]
            try:
                stamp = _stamp(self.folder / name)
                if self._same.get(name) != stamp:
                    self._send(name, stamp)
            except Exception as error:  # the next file that is written whole says it
                reason = " ".join(str(error).split())[:200]
                _log.warning("%s/%s: not copied yet (%s)", self.address, name, reason)

    def digests(self):
        """Returns {name: digest} of the files that both sides have alike."""
        return {name: self._digest(name) for name in filter(_is_read, self._same)}

    def follow(self, digests):
        """Makes the mirror hold the files with these digests, and no others."""
        with self._lock, self._speaking("read"):
            self._fetch([n for n, d in digests.items() if self._digest(n) != d])
            self._drop(self._same.keys() - digests.keys())

    def _digest(self, name):
        path = self.folder / name
        if not path.exists():
            return ""
        stamp = _stamp(path)
        if self._digests.get(name, ("",))[0] != stamp:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
            self._digests[name] = stamp, digest
        return self._digests[name][1]

    def _here(self):
        """Returns {name: stamp} of the mirror's files."""
        files = {}
        for folder, folders, names in os.walk(self.folder):
            folders[:] = [n for n in folders if _belongs(n) and n not in DIRECT]
            for name in filter(_belongs, names):
                path = Path(folder, name)
                files[path.relative_to(self.folder).as_posix()] = _stamp(path)
        return files

    def _key(self, name):
        return f"{self.base}/{Path(name).as_posix()}"

    @contextlib.contextmanager
    def _speaking(self, what):
        """Turns what a store's client raises, of whatever type, into one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise _refusal(self.address, what, error) from error

    def _within(self, call):
        """Calls a function in a thread, and gives up after `REACHING` seconds."""
        result = {}

        def work():
            try:
                result["value"] = call()
            except Exception as error:
                result["error"] = error

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(REACHING)
        if thread.is_alive():
            raise TimeoutError(f"no answer within {REACHING} s")
        if "error" in result:
            raise result["error"]
        return result["value"]


def _refusal(address, what, error):
    """Returns the one line about a store that refuses."""
    chain, one = [], error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    names = {type(one).__name__ for one in chain}
    line = " ".join(str(error).split())[:200] or type(error).__name__
    if names & {"NoCredentialsError", "DefaultCredentialsError", "RefreshError"}:
        remedy = (
            "no credentials: `gcloud auth application-default login` for gs://, "
            "$AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY or a profile for s3://"
        )
    elif isinstance(error, PermissionError):
        remedy = "these credentials may not; ask for the right to list, read and write"
    elif isinstance(error, FileNotFoundError):
        remedy = "is the bucket there?"
    else:
        remedy = (
            "once this machine reaches the store and has credentials for it, the same "
            "command goes on from what it holds"
        )
    return UserError(f"--workdir={address}: cannot {what} it ({line}); {remedy}")


def _stamp(path):
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _belongs(name):
    """Returns whether a file or folder goes to the store: none that is half done."""
    return not name.startswith(".") and not name.endswith(".work")


def _is_read(name):
    """Returns whether a file is copied from the store: nothing here reads events."""
    name = name.rpartition("/")[2]
    return _belongs(name) and not name.startswith("events.out.tfevents")


def _scratch():
    """Returns a new folder that is removed when this process ends, or after it."""
    parent = process.cache("workdirs").resolve()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent))
        for lock in parent.glob("*.lock"):
            if _free(lock):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
        handle = os.open(f"{folder}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(
            f"{parent}: cannot write here ({error.strerror}); name another folder of "
            "this machine with --cache"
        ) from error
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _free(lock):
    """Returns whether the process that held a lock is gone."""
    try:
        import fcntl

        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
