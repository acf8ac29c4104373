"""Where the facts that ship with quantkit lie: `calibration/` and `model_zoo/`, in a wheel or in a checkout."""

from pathlib import Path


def data_dir(name: str) -> Path:
    """Return the directory of facts `name`: `quantkit/_data/<name>` in a wheel, `<checkout>/<name>` otherwise.

    Raises:
        FileNotFoundError: neither exists, so the installation is damaged.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "_data" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"quantkit's data directory {name!r} is missing; reinstall quantkit")
