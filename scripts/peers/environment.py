"""The Python environment of the peers: a virtual environment in .peers/venv with the versions that are compared against."""
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PEERS = os.path.join(ROOT, ".peers")
# torch's wheel brings its CUDA libraries along (about 2.5 GB down, 7 GB unpacked), though only the CPU is used here.
PACKAGES = ["torch==2.8.0", "transformers==5.23.0", "peft==0.21.2", "bitsandbytes==0.50.2", "accelerate==1.15.0",
            "safetensors==0.8.0"]


def enter():
    """Goes on in the environment, making it first if need be. HALFBYTE_PEERS_PYTHON names another python to use."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                      PYTHONWARNINGS="ignore", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    if os.environ.get("HALFBYTE_PEERS_ENTERED"):
        return
    python = os.environ.get("HALFBYTE_PEERS_PYTHON") or install()
    os.environ["HALFBYTE_PEERS_ENTERED"] = "1"
    os.execv(python, [python, *sys.argv])


def install():
    python, mark = f"{PEERS}/venv/bin/python", f"{PEERS}/venv/installed.json"
    if os.path.exists(mark) and json.load(open(mark)) == PACKAGES:
        return python
    print(f"installing into .peers/venv: {' '.join(PACKAGES)}", file=sys.stderr, flush=True)
    if not os.path.exists(python) and subprocess.run([sys.executable, "-m", "venv", f"{PEERS}/venv"]).returncode:
        sys.exit("python's venv module is needed (on Debian and Ubuntu: apt-get install python3-venv)")
    if subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES]).returncode:
        sys.exit("the packages could not be installed")
    with open(mark, "w") as f:
        json.dump(PACKAGES, f)
    return python


def halfbyte(binary=None):
    """The release binary without CUDA: `binary`, or built now."""
    if binary:
        return os.path.abspath(binary)
    command = ["cargo", "build", "--release", "--no-default-features", "--bin", "halfbyte"]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"this failed: {' '.join(command)}")
    return os.path.join(os.environ.get("CARGO_TARGET_DIR") or f"{ROOT}/target", "release", "halfbyte")


def smollm2(model=None):
    """The model directory: `model`, or SmolLM2-135M-Instruct, fetched if need be."""
    if model:
        return os.path.abspath(model)
    target = f"{ROOT}/.demo/smollm2"
    if subprocess.run([sys.executable, f"{ROOT}/scripts/fetch-smollm2", target], stdout=sys.stderr).returncode:
        sys.exit(1)
    return target
