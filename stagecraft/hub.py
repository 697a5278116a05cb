"""Models and data of the Hugging Face hub, as they lie in its cache on this machine.

Nothing here asks the network: what is not in the cache is named, with the command that
downloads it.
"""

import os
import re
from pathlib import Path

# ORG/NAME, or the NAME of an old model, and perhaps the revision.
_ID = re.compile(r"[\w.-]*\w(/[\w.-]*\w)?(@[\w./-]+)?")


def cache() -> Path:
    """Returns the folder of the hub's cache, as huggingface_hub finds it."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(named or os.path.join(home, "hub"))).expanduser()


def is_id(name: str | Path) -> bool:
    """Tells whether a name is no path here, but may be that of a model on the hub."""
    return not Path(name).exists() and bool(_ID.fullmatch(str(name)))


def find(
    name: str | Path,
    *,
    files: tuple[str, ...] = ("*.safetensors", "*.bin"),
    kind: str = "model",
) -> Path | None:
    """Returns the folder of a snapshot in the cache; None where there is none.

    Args:
        name: ORG/NAME, or ORG/NAME@REVISION: a branch, a tag or a commit; main without.
        files: patterns; a snapshot with none of them is as good as none.
        kind: "model" or "dataset".
    """
    if not is_id(name):
        return None
    name, _, revision = str(name).partition("@")
    root = cache() / f"{kind}s--{name.replace('/', '--')}"
    reference = root / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshots = root / "snapshots"
    if not commit and len(names := list(snapshots.glob("*"))) == 1:
        commit = names[0].name  # downloaded by its commit
    folder = snapshots / (commit or "none")
    present = (path for pattern in files for path in folder.glob(pattern))
    return folder if any(path.exists() for path in present) else None


def absent(name: str | Path, kind: str = "model") -> str:
    """Returns what to say of a model, or a "dataset", that is not in the cache."""
    plain, _, revision = str(name).partition("@")
    more = " --repo-type dataset" if kind == "dataset" else ""
    more += f" --revision {revision}" if revision else ""
    return (
        f"{name}: no such folder, and no whole {kind} of that name in the hub's cache "
        f"({cache()}); download it with: hf download {plain}{more}"
    )
