#!/usr/bin/env bash
# Is HACL right on this GPU, and what does it cost there? Each part writes its files as it ends, and is not run again.
#   make gpu                                         or: benchmarks/gpu.sh PYTHON, with torch for CUDA, llava and this
#   SHAPE=tiny VISUAL=9 IMAGES="2" ROUNDS=1 OUT=runs/gpu-tiny benchmarks/gpu.sh .venv/bin/python     on a CPU: that it runs
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3} out=${OUT:-runs/gpu}
shape=${SHAPE:-7b} images=${IMAGES:-8 16 32} visual=${VISUAL:-576} rounds=${ROUNDS:-5} zero=${ZERO:-2 3}
most=${images##* } failed=()
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} # else gaps eat what is measured
mkdir -p "$out"

part() { # name, file that it leaves, command
    local name=$1 file=$out/$2 began=$SECONDS
    shift 2
    if [ -e "$file" ]; then echo "$name: there already, $file"; return; fi
    if timeout 600 "$python" "$@" >"$out/$name.log" 2>&1; then
        echo "$name: $((SECONDS - began)) s, $file"
    else
        echo "$name: failed after $((SECONDS - began)) s; the end of $out/$name.log:"
        tail -n 15 "$out/$name.log"
        failed+=("$name")
    fi
}

sizes=(--shape "$shape" --visual "$visual" --output "$out")
if [ "$shape" = 7b ]; then part tests tests.xml -m pytest -m gpu --junitxml "$out/tests.xml"; fi
part parity parity.json benchmarks/step.py --parity "${sizes[@]}"
for n in $images; do # ours without each idea, and the largest batch that fits, once
    only=() && [ "$n" = "$most" ] || only=(--only A: B: C: P: T:)
    part "step-$n" "step-$n.json" benchmarks/step.py --timed "${sizes[@]}" --images "$n" --rounds "$rounds" --name "$n" \
        "${only[@]}"
done
# shellcheck disable=SC2086
part engines engines.json benchmarks/engines.py "${sizes[@]}" --images "$most" --zero $zero
if [ "$shape" = 7b ]; then
    # a real, small LLM; goes on where it was
    part study study-smollm2.json benchmarks/study.py --results "$out" --steps 240 --seeds 0 1 2 3 4 --arms plain eos late
fi
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}; the same command goes on"; exit 1; }
