"""Loading the full-size model: time and peak memory, ours beside diffusers, each load in a process of its own, in turns.

    python -m benchmarks.load [--model FOLDER] [--runs 5] [--json benchmarks/results/load.json]

Without --model a diffusers folder of seeded random weights is made first (5.5 GB, in a temporary folder, by diffusers).
Every process starts with the files in the page cache. Columns, medians over the runs:

    import   importing the library and what loading needs
    load     from the path to every component, tokenizer and schedule ready
    touch    reading every weight once afterwards: a lazy load pays here
    peak     highest resident memory of the process at the end of `load`, and its share of the weights' bytes
    growth   that peak less the peak before `load`, as a share of the weights' bytes

Ours reads every weight while loading, to refuse NaN; diffusers maps float32 weights and reads none. `floor` is the time to
sum the mapped files, the least that any load that checks its weights can take.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = [(side, dtype) for dtype in ("float32", "bfloat16") for side in ("ldm", "diffusers")]
COLUMNS = ("import", "load", "import + load", "touch", "peak GB", "peak share", "growth share")

OURS = """
import ldm, ldm.checkpoint
start_load()
model = ldm.load({folder!r}, dtype=torch.{dtype})
parts = [model.text_encoder, model.unet, model.autoencoder, model.safety]
"""
THEIRS = """
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
start_load()
model = StableDiffusionPipeline.from_pretrained({folder!r}, torch_dtype=torch.{dtype})
parts = [model.text_encoder, model.unet, model.vae, model.safety_checker]
"""
FRAME = """
import json, resource, time
def peak_resident(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
clock = [time.perf_counter()]
import torch
def start_load(): clock.append(time.perf_counter()); before.append(peak_resident())
before = []
{body}
clock.append(time.perf_counter())
peak = peak_resident()
tensors = [t for part in parts if part is not None for t in part.state_dict().values()]
start = time.perf_counter()
for tensor in tensors: tensor.sum()
touch = time.perf_counter() - start
size = sum(t.nbytes for t in tensors)
print(json.dumps(dict(times=[clock[1] - clock[0], clock[2] - clock[1], touch], peak=peak, before=before[0], size=size)))
"""
FLOOR = """
import sys, time, torch
from pathlib import Path
start = time.perf_counter()
for path in Path(sys.argv[1]).rglob("*.safetensors"):
    torch.from_file(str(path), shared=False, size=path.stat().st_size // 4, dtype=torch.float32).sum()
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading time and memory beside diffusers.")
    parser.add_argument("--model", type=Path, help="a full-size diffusers folder; default: make one of random weights")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the table and every run here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or make_model(Path(temporary))
        python("-c", FLOOR, str(folder))  # brings the files into the page cache
        runs = {case: [] for case in CASES}
        floors, imports = [], {"import ldm": [], "python -m weights_convert --help": []}
        for _ in range(options.runs):
            floors.append(float(python("-c", FLOOR, str(folder))))
            for name, seconds in imports.items():
                seconds.append(import_time(name))
            for case in CASES:
                runs[case].append(measure(folder, *case))
    report(runs, floors, imports, options.json)


def make_model(folder: Path) -> Path:
    """SD v1 with seeded random weights and a safety checker."""
    from ldm.models.safety import SafetyConfig
    from ldm.presets import preset
    from tests import peers
    from weights_convert.tokenizer_files import clip_vocabulary, write_vocabulary

    write_vocabulary(folder, clip_vocabulary())
    return peers.write_folder(folder / "model", preset("sd-v1"), folder, safety=SafetyConfig())


def python(*arguments: str) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a measured process failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().rsplit("\n", 1)[-1]


def measure(folder: Path, side: str, dtype: str) -> dict[str, float]:
    body = (OURS if side == "ldm" else THEIRS).format(folder=str(folder), dtype=dtype)
    result = json.loads(python("-c", FRAME.format(body=body)))
    importing, loading, touching = result["times"]
    peak, size = result["peak"], result["size"]
    values = (importing, loading, importing + loading, touching, peak / 1e9, peak / size, (peak - result["before"]) / size)
    return dict(zip(COLUMNS, values, strict=True))


def import_time(name: str) -> float:
    """Seconds that the import, or the command, adds to an interpreter that does nothing; a whole process each."""
    import time

    command = ["-c", "import ldm"] if name == "import ldm" else ["-m", "weights_convert", "--help"]
    seconds = []
    for arguments in (["-c", "pass"], command):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return seconds[1] - seconds[0]


def report(runs: dict, floors: list[float], imports: dict[str, list[float]], target: Path | None) -> None:
    print(f"{'':<22}" + "".join(f"{column:>15}" for column in COLUMNS))
    medians = {}
    for (side, dtype), values in runs.items():
        medians[f"{side} {dtype}"] = {column: statistics.median(v[column] for v in values) for column in COLUMNS}
        print(f"{side + ' ' + dtype:<22}" + "".join(f"{medians[f'{side} {dtype}'][c]:>15.3f}" for c in COLUMNS))
    floor = statistics.median(floors)
    print(f"\nfloor: summing the mapped files takes {floor:.3f} s")
    for dtype in ("float32", "bfloat16"):
        ours, theirs = medians[f"ldm {dtype}"], medians[f"diffusers {dtype}"]
        ratios = {c: ours[c] / theirs[c] for c in ("import", "load", "import + load", "peak GB")}
        print(f"{dtype}, ours over theirs: " + ", ".join(f"{c} {r:.2f}" for c, r in ratios.items()))
    extra = {name: statistics.median(seconds) for name, seconds in imports.items()}
    print("\n".join(f"{name}: {seconds:.3f} s beyond an empty interpreter" for name, seconds in extra.items()))
    if target:
        named = {f"{side} {dtype}": values for (side, dtype), values in runs.items()}
        result = {"machine": machine(), "medians": medians, "floor": floor, "imports": extra, "runs": named}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {target}")


def machine() -> dict[str, str]:
    """What the figures hold for."""
    import os
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().split("\n") if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")}
    return {"cpu": model, "cores": str(os.cpu_count()), "python": platform.python_version(), **versions}


if __name__ == "__main__":
    main()
