"""SHA-256 of the data files that are pickles: only the published files are unpickled.

torchvision reads CIFAR's batches with pickle after an MD5 check. These are the sums of the archives of the data set's
home page and of the files in them.
"""

from pathlib import Path

from bench.atomic import file_hash

_ARCHIVES = {
    "cifar10": ("cifar-10-python.tar.gz", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
    "cifar100": ("cifar-100-python.tar.gz", "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"),
}
FILES: dict[str, dict[str, str]] = {
    "cifar10": {
        "cifar-10-batches-py/data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
        "cifar-10-batches-py/data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
        "cifar-10-batches-py/data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
        "cifar-10-batches-py/data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
        "cifar-10-batches-py/data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
        "cifar-10-batches-py/test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
        "cifar-10-batches-py/batches.meta": "f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb",
    },
    "cifar100": {
        "cifar-100-python/train": "735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b",
        "cifar-100-python/test": "4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864",
        "cifar-100-python/meta": "a5d4786345c961390f865e93b434dbd5c6904ce880667e0cb888c97d449f28b9",
    },
}


def check(name: str, root: Path) -> None:
    """Reject files of a data set below `root` that differ from the published ones. Raises ValueError in one line."""
    for relative, expected in FILES.get(name, {}).items():
        found = file_hash(root / relative)
        if found != expected:
            raise ValueError(
                f"{name} under {root} is damaged or another: {relative} has SHA-256 {(found or 'none')[:12]}, expected "
                f"{expected[:12]}; nothing in it was unpickled. Remove it, to load it anew"
            )


def check_archive(name: str, folder: Path) -> None:
    """Reject the archive of a data set in `folder`, if there is one, unless it is the published one. Raises
    ValueError."""
    file, expected = _ARCHIVES.get(name, ("", ""))
    found = file_hash(folder / file) if file else None
    if found not in (None, expected):
        raise ValueError(f"{folder / file} is not {name}: SHA-256 {found[:12]}, expected {expected[:12]}; remove it")
