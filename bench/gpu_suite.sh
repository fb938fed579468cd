#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: bash bench/gpu_suite.sh
#
# Installs the checkout into a folder of its own, runs the GPU tests, then the benchmarks. Log and JSON go to $OUT
# (default out/gpu). Wants a CUDA device and Python 3.10 or later with torch, triton, click, tqdm, pytest and hypothesis;
# needs no network. Waterfall and latency want diffusers, safetensors and filelock too, and are left out without them.
# Without a CUDA device the suite does what it can, says so and exits with 3.
#
# PYTHON chooses the interpreter, DDENGINE_COMMIT names the commit where .git did not travel, LIMIT is the longest time
# of one step in seconds, STEPS the steps to run (default: all), DDENGINE_PEERS a folder of other editors' checkouts to run
# beside this one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${OUT:-out/gpu}" && cd "${OUT:-out/gpu}" && pwd) || exit 1
LIMIT=${LIMIT:-420}
STEPS=${STEPS:-"tests tensorrt compile kernels engine parity waterfall latency peers"}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
LOG=$OUT/suite.log
: >"$LOG"
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET

say() { echo "$@" | tee -a "$LOG"; }

summary=()
failed=0
# step NAME COMMAND...: run it, keep what it says, go on whatever happens.
step() {
  local name=$1 started=$SECONDS code
  shift
  say "== $name: $*"
  timeout "$LIMIT" "$@" 2>&1 | tee -a "$LOG"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 124 ] && say "$name: stopped after $LIMIT s"
  [ "$code" -eq 0 ] || failed=1
  summary+=("$(printf '%-14s exit %-4s %s s' "$name" "$code" $((SECONDS - started)))")
  return "$code"
}
wanted() { [[ " $STEPS " == *" $1 "* ]]; }
# bench NAME ARGUMENTS...: a benchmark and the JSON it writes.
bench() { step "$1" "$PYTHON" -m ddengine bench "${@:2}"; }

say "$("$PYTHON" - 2>&1 <<'PYTHON'
import importlib.util
import sys

missing = [name for name in ("torch", "triton", "click", "tqdm", "numpy", "PIL", "pytest", "hypothesis")
           if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing: {', '.join(missing)}; install them and run this again")
import platform

import torch
import triton

device = "no CUDA device"
if torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    device = f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory >> 30} GiB"
print(f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, {device}")
PYTHON
)"
grep -q "^Python " "$LOG" || exit 1

# The sources are copied first: a build leaves folders beside them.
mkdir "$WORK/source" &&
  cp -r ddengine kernels bench examples setup.py pyproject.toml README.md LICENSE "$WORK/source" &&
  { [ ! -d export ] || cp -r export "$WORK/source"; } &&
  rm -rf "$WORK"/source/ddengine/{kernels,bench,examples,export}
step install "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation --no-compile \
  --target "$WORK/site" "$WORK/source" || exit 1

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
cuda=$?
if [ "$cuda" -eq 0 ]; then
  # On a GPU the operators' tests run the kernels there; interpreter and compiler have been tested elsewhere.
  wanted tests && step tests "$PYTHON" -m pytest -q -m "not slow" -p no:cacheprovider --durations=10 \
    --ignore=tests/kernels/test_interpreter.py --ignore=tests/kernels/test_compilation.py \
    tests/kernels tests/bench/test_timer.py
  # First of all, whether TensorRT-RTX takes this GPU; skipped with the reason where it is not installed.
  wanted tensorrt && step tensorrt "$PYTHON" -m pytest -q -rs -m gpu -p no:cacheprovider tests/backends/test_tensorrt_gpu.py
fi
wanted compile && bench compile kernels --compile
if [ "$cuda" -eq 0 ]; then
  wanted kernels && bench kernels kernels -o "$OUT/kernels.json"
  if "$PYTHON" -c 'import diffusers, filelock, safetensors' 2>>"$LOG"; then
    # Everything else that is marked for a GPU, then the compiled step held to the plain one, in half precision.
    wanted engine && step engine "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests \
      --ignore=tests/kernels --ignore=tests/backends/test_tensorrt_gpu.py
    wanted parity && bench parity parity --dtype float16 -o "$OUT/parity.json"
  else
    say "engine, parity: need diffusers, safetensors and filelock; not run"
  fi
  if wanted waterfall && ! "$PYTHON" -c 'import diffusers, filelock, safetensors' 2>>"$LOG"; then
    say "waterfall: needs diffusers, safetensors and filelock; not run"
  elif wanted waterfall; then
    # Whole edits at the Stable Diffusion 1.5 shape. What the compiled bars lack takes minutes to build, once a cache:
    # give them a longer LIMIT the first time. Either file holds the rounds that were done when time ran out.
    bench waterfall waterfall --shape sd15 --rounds 3 -o "$OUT/waterfall-eager.json"
    bench compiled waterfall --shape sd15 --rounds 3 --compile -o "$OUT/waterfall.json"
  fi
  if wanted latency && ! "$PYTHON" -c 'import diffusers, filelock, safetensors' 2>>"$LOG"; then
    say "latency: needs diffusers, safetensors and filelock; not run"
  elif wanted latency; then
    # Plain first, by itself; then the backends that have to be built, minutes for each number of points. Run into the
    # same $OUT again, a step that time ended goes on with what it lacks.
    for shape in embedded sd15; do
      model=(--dtype float16 --updates 30 --resume)
      [ "$shape" = sd15 ] && model+=(--shape sd15)
      bench "plain-$shape" latency "${model[@]}" --backend eager -o "$OUT/latency-$shape-eager.json"
      bench "built-$shape" latency "${model[@]}" --points 1 --points 4 --backend eager --backend compile \
        --backend tensorrt --backend auto --build -o "$OUT/latency-$shape.json" --csv "$OUT/latency-$shape.csv"
    done
  fi
  if wanted peers && [ -z "${DDENGINE_PEERS:-}" ]; then
    say "peers: DDENGINE_PEERS names no folder of checkouts; not run"
  elif wanted peers; then
    # Other editors at the same shape: a folder each, directdrag, gooddrag ..., with the Python of its .venv, if any.
    peers=()
    for folder in "$DDENGINE_PEERS"/*/; do
      name=$(basename "$folder")
      peers+=(--repo "$name=$folder")
      [ -x "$folder.venv/bin/python" ] && peers+=(--python "$name=$folder.venv/bin/python")
    done
    bench peers peers --model sd15 --dtype float16 --updates 30 "${peers[@]}" -o "$OUT/peers.json"
  fi
else
  say "no CUDA device: the GPU tests and the benchmarks were not run; run this where torch.cuda.is_available()"
fi

say "== summary"
for line in "${summary[@]}"; do say "$line"; done
[ "$failed" -eq 0 ] || exit 1
[ "$cuda" -eq 0 ] || exit 3
