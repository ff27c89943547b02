"""One environment per peer, made from the package registry.

    python benchmarks/peers/environments.py [--work benchmarks/peers/work] [--only fastai timm]

`uv venv` makes each, and one `uv pip install` fills it: torch and torchvision are named in the same command as the
peer, so that the registry's own pair is taken (a torch from another index fails beside it at import). Files are hard
links into uv's cache: ten environments with one torch take the disk of one. What was installed stands in
`WORK/envs/NAME.txt`; an environment with such a list is left alone. `--latest` drops the versions below and writes
what the registry has.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
TORCH = ("torch", "torchvision")
ENVIRONMENTS = {
    "timm": (*TORCH, "timm==1.0.28", "scikit-learn"),
    "fastai": (*TORCH, "fastai==2.8.12", "timm==1.0.31"),
    "autotimm": (*TORCH, "autotimm==0.7.37"),
    "transformers": (*TORCH, "transformers==5.23.0", "datasets", "accelerate", "timm==1.0.31", "scikit-learn"),
    "lightly": (*TORCH, "lightly-train==0.18.0", "timm"),
    "autogluon": (*TORCH, "autogluon.multimodal==1.6.3"),
    "keras": ("tensorflow==2.21.0", "keras==3.15.1", "safetensors", "pyyaml", "pillow"),
}
"""What a user installs for each, by the peer's own page, and what hands it local weights."""
PYTHON_VERSION = "3.11"


def uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise SystemExit("uv is not installed: `pip install uv` in this environment, or `make setup`.")
    return found


def python_of(work: Path, environment: str) -> Path:
    """The interpreter of an environment, whether it is there or not."""
    return work / "envs" / environment / "bin" / "python"


def make(work: Path, environment: str, latest: bool) -> None:
    """Make one environment; nothing where its list is there already."""
    listing = work / "envs" / f"{environment}.txt"
    if listing.exists():
        return
    python = python_of(work, environment)
    requirements = [text.split("==")[0] if latest else text for text in ENVIRONMENTS[environment]]
    # uv takes VIRTUAL_ENV for its target; a hard link costs no disk where the cache is on the same one
    plain = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    variables = {**plain, "UV_LINK_MODE": "hardlink"}
    subprocess.run(
        [uv(), "venv", "--quiet", "--clear", "--python", PYTHON_VERSION, python.parent.parent],
        check=True,
        env=variables,
    )
    subprocess.run([uv(), "pip", "install", "--quiet", "--python", python, *requirements], check=True, env=variables)
    frozen = subprocess.run(
        [uv(), "pip", "freeze", "--python", python], check=True, env=variables, capture_output=True, text=True
    )
    listing.write_text(frozen.stdout, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("--latest", action="store_true", help="the registry's newest versions, not those named here")
    arguments = parser.parse_args()
    failed = []
    for environment in arguments.only:
        try:
            make(arguments.work.resolve(), environment, arguments.latest)
            print(f"{environment}: ready", flush=True)
        except subprocess.CalledProcessError as fault:
            failed.append(environment)
            print(
                f"{environment}: failed ({' '.join(map(str, fault.cmd[:4]))} ... left {fault.returncode})", flush=True
            )
    raise SystemExit(f"not made: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
