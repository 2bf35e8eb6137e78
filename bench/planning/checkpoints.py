"""The checkpoint that an option names: a file, or one of the Hugging Face Hub, `hf:OWNER/REPO[/FILE][@REVISION]`.

The latter is downloaded once into the Hub's own cache (`HF_HOME`) and found there without a network. `huggingface_hub`
is an extra (`pip install "defense-bench[zoo]"`), imported only for such a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ENDINGS = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin")  # a repository's file is chosen in this order
HUB = "hf:"
_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>[^@]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights. `row`: its name in tables; `origin`: repository, file and commit of one that comes from a hub,
    as the record of its import holds them."""

    path: Path
    row: str
    origin: str | None = None


def find(name: str) -> Checkpoint:
    """The checkpoint at a path or of a hub's name. Raises OSError, ValueError or LookupError in one line."""
    if name.startswith(HUB):
        return _from_hub(name)
    path = Path(name)
    check_file(path, "checkpoint")
    return Checkpoint(path, path.stem)


def check_file(path: Path, what: str) -> None:
    """Raise in one line unless a path is a file with something in it."""
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder; expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"no {what} {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{what} {path} is empty")


def _from_hub(name: str) -> Checkpoint:
    """A repository's file at the revision (a branch, a tag or a commit; main if none is named); if no file is named,
    its only checkpoint, safetensors before all others."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"'{name}'; expected hf:OWNER/REPO, hf:OWNER/REPO/FILE or either with @REVISION")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise LookupError(f'{name} needs huggingface_hub: pip install "defense-bench[zoo]"') from None
    repo, revision = found["repo"], found["revision"] or "main"
    try:
        file = found["file"] or _only_checkpoint(name, repo, revision)
        path = Path(hf_hub_download(repo, file, revision=revision))
    except LocalEntryNotFoundError:
        wanted = f"{repo} {found['file']}" if found["file"] else repo
        raise LookupError(
            f"{name} is not in the cache of huggingface_hub, and its site cannot be reached; where it can: hf download "
            f"{wanted}, then copy that cache here and set HF_HOME to it, or give the file itself in place of hf:..."
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise LookupError(f"{name}: {' '.join(str(error).split())}") from None
    return Checkpoint(path, repo.partition("/")[2], f"{HUB}{repo}/{file}@{_commit(path)}")


def _only_checkpoint(name: str, repo: str, revision: str) -> str:
    """The file to take of a repository of which no file was named."""
    files = _files(repo, revision)
    for ending in ENDINGS:
        fitting = sorted(file for file in files if file.endswith(ending))
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise LookupError(f"{name} has {len(fitting)} checkpoints; add one: {', '.join(fitting)}")
    raise LookupError(f"{name} has no checkpoint ({', '.join(ENDINGS)}), only {', '.join(sorted(files)) or 'no file'}")


def _files(repo: str, revision: str) -> list[str]:
    """All files of the repository; without a network those in the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().list_repo_files(repo, revision=revision)
    except HfHubHTTPError:  # the site's own answer, such as "no such repository"
        raise
    except Exception:  # no connection: an exception of its HTTP client, which is another one in each of its versions
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _commit(path: Path) -> str:
    """The commit of a file in the cache, which lies at snapshots/COMMIT/FILE."""
    parts = path.parts
    return parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]
