"""How long things take on a CPU, beside the peers, in one run: Stable Diffusion v1's sizes, 512 x 512, guidance on.

    pip install '.[test,reference]' openvino stable-diffusion-cpp-python      # the last two where they are wanted
    python -m benchmarks.speed [--dtype bfloat16] [--model FOLDER] [--rounds 3] [--only NAME ...] [--json FILE]

Without --model a diffusers folder of seeded random weights is made first (5.5 GB, in a temporary folder, by diffusers). Every
implementation runs in a process of its own, one after the other, as often as there are rounds; figures are medians over the
rounds. They are only comparable with figures of the same run.

    import     of the library          unet      a step: both halves of guidance, and their combination
    load       ready to run            picture   text to image, DDIM, --steps steps, with decoding
    text       both prompts encoded    peak GB   highest resident memory of the process, without and with a picture

`floor` is the arithmetic of each (`WORK`) at the machine's best rate, measured between the rounds, of a matrix product or a
convolution of the same type.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import weights_convert
from benchmarks import plots
from benchmarks.contenders import CONTENDERS, CPP
from benchmarks.load import machine, make_model

CASES = ("text", "unet", "decode", "encode", "picture")
COLUMNS = ("import", "load", "text", "unet", "decode", "encode", "picture", "peak GB", "peak GB, with a picture")
WORK = {"text": 0.027, "unet": 1.607, "decode": 2.52, "encode": 1.12}  # TFLOP, as a direct convolution counts them
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a full-size diffusers folder; default: make one of random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a picture (default 4)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=installed(), metavar="NAME")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, help="write every run and the medians here, and the plot beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or make_model(Path(temporary))
        if CPP in options.only and not folder.with_suffix(".safetensors").exists():
            weights_convert.write(weights_convert.read(folder), folder.with_suffix(".safetensors"), "compvis")
        runs, ceilings = {name: [] for name in options.only}, []
        for i in range(options.rounds):
            ceilings.append(run("-m", "benchmarks.ceilings", options.dtype))
            for name in options.only:
                start = time.perf_counter()
                arguments = (name, str(folder), options.dtype, str(options.steps), ",".join(options.cases))
                runs[name].append(run("-m", "benchmarks.measure", *arguments))
                print(f"round {i + 1}: {name}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
                report(options, runs, ceilings)
    print(table(runs, ceilings))


def installed() -> list[str]:
    """The implementations that can be timed here."""
    packages = {"OpenVINO": "openvino", CPP: "stable_diffusion_cpp"}
    return [name for name in CONTENDERS if importlib.util.find_spec(packages.get(name, "torch"))]


def run(*arguments: str) -> dict[str, float]:
    """The JSON in the last line that a fresh interpreter prints; what went wrong, where it does not."""
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True)
    if done.returncode:
        return {"failed": " ".join(done.stderr.split())[-300:]}
    return json.loads(done.stdout.strip().rsplit("\n", 1)[-1])


def medians(runs: list[dict]) -> dict[str, float]:
    names = dict.fromkeys(name for one in runs for name, value in one.items() if isinstance(value, float))
    return {name: statistics.median(one[name] for one in runs if name in one) for name in names}


def table(runs: dict[str, list[dict]], ceilings: list[dict]) -> str:
    found = {name: medians(ones) for name, ones in runs.items()}
    best = medians(ceilings)
    lines = [f"{'':<42}" + "".join(f"{column.replace(', with a picture', '+'):>11}" for column in COLUMNS)]
    for name, values in found.items():
        cells = (f"{values[column]:>11.3f}" if column in values else f"{'-':>11}" for column in COLUMNS)
        failed = next((one["failed"] for one in runs[name] if "failed" in one), "")
        lines.append(f"{name:<42}" + "".join(cells) + (f"  failed: {failed}" if failed else ""))
    least = floors(ceilings)
    if least:
        cells = (f"{least[column]:>11.3f}" if column in least else f"{'':>11}" for column in COLUMNS)
        lines.append(f"{'floor, at ' + format(rate(ceilings), '.2f') + ' TFLOP/s':<42}" + "".join(cells))
    lines.append("ceilings: " + ", ".join(f"{name} {value:.3f}" for name, value in best.items()))
    lines += ratios(found)
    return "\n".join(lines)


def rate(ceilings: list[dict]) -> float:
    """TFLOP/s at the machine's best."""
    best = medians(ceilings)
    return max(best.get("matmul", 0.0), best.get("convolution", 0.0))


def floors(ceilings: list[dict]) -> dict[str, float]:
    """Seconds for the arithmetic alone."""
    return {name: work / rate(ceilings) for name, work in WORK.items()} if rate(ceilings) else {}


def ratios(found: dict[str, dict[str, float]]) -> list[str]:
    """How many times as long the peers take as ours."""
    peers = {name: values for name, values in found.items() if not name.startswith("ldm")}
    lines = []
    for ours in [name for name in found if name.startswith("ldm")]:
        for column in ("unet", "decode", "encode", "picture"):
            others = {name: values[column] / found[ours][column] for name, values in peers.items() if column in values}
            if others and column in found[ours]:
                lines.append(f"{ours}, {column}: " + ", ".join(f"{ratio:.2f} {name}" for name, ratio in others.items()))
    return lines


def report(options: argparse.Namespace, runs: dict[str, list[dict]], ceilings: list[dict]) -> None:
    """Write what there is so far."""
    if options.json is None:
        return
    found = {"machine": machine(), "dtype": options.dtype, "steps": options.steps}
    found["medians"] = {name: medians(ones) for name, ones in runs.items() if ones}
    found |= {"ceilings": medians(ceilings), "floors": floors(ceilings), "runs": runs}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib"):
        plots.plot(found, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
