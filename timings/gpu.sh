#!/usr/bin/env bash
# All that a GPU should show, in under 25 minutes: exact presets as CUDA graphs and `fast` against a plain loop, peak memory
# beside a student step's, whole erasures by each preset, and rows of table 3 that have no record yet.
#
#     timings/gpu.sh OUT              # records into OUT; what is there is not made again, so it goes on where it was stopped
#     timings/gpu.sh OUT --smallest   # the same on the CPU with next to nothing to do: tries the way, its figures mean nothing
#
# $DHBE_DATA holds CIFAR-10; without it erasures are not measured, and table 3 is left out. $PYTHON is the interpreter.
set -u
out=${1:?where to?}
python=${PYTHON:-python}
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
ends=$((SECONDS + 24 * 60))
failed=0

nets="resnet18 wrn16-1" precisions="fp32 bf16" against="official fast" presets="official paper fast" victims="badnets-3 trojaning-5"
timed="--repeats 9 --device cuda" sized="--device cuda" erased="--device cuda" rounds="" slack=1
if [ "${2:-}" = --smallest ]; then
    nets=resnet8 precisions=fp32 against=official presets=official victims=badnets-3
    timed="--repeats 1 --batch 2 --steps 1 --device cpu" sized="--batch 4 --device cpu" erased="--device cpu"
    rounds="--iterations 2 --batch 4" slack=10  # the machine of a test may be busy
fi

# A step: the record that it leaves, the seconds that it may take, and its command. Steps are many and each is short, so
# that one which fails or takes too long costs no other.
step() {
    local record=$out/$1 most=$((slack * $2))
    shift 2
    [ -e "$record" ] && return
    local left=$((ends - SECONDS))
    [ "$left" -lt 10 ] && { echo "no time left for $record"; failed=1; return; }
    echo "== $record"
    timeout "$((left < most ? left : most))" "$@" || { echo "$record: exit code $?"; failed=1; }
}

step doctor.json 60 sh -c "$python -m dhbe doctor --json > '$out/doctor.tmp' && mv '$out/doctor.tmp' '$out/doctor.json'"
for net in $nets; do
    for precision in $precisions; do
        for preset in $against; do
            step "iteration_${net}_${preset}_$precision.json" 120 "$python" -m timings.iteration --arch "$net" \
                --preset "$preset" --precision "$precision" $timed --json "$out/iteration_${net}_${preset}_$precision.json"
        done
        step "memory_${net}_$precision.json" 120 "$python" -m timings.memory --arch "$net" --precision "$precision" $sized \
            --json "$out/memory_${net}_$precision.json"
    done
done
measured=()
[ -n "${DHBE_DATA:-}" ] && ls "$DHBE_DATA"/cifar10* > /dev/null 2>&1 && measured=(--data cifar10)
for victim in $victims; do
    for preset in $presets; do
        known=()
        [ "${#measured[@]}" -gt 0 ] && known=("${measured[@]}" --trigger "zoo/$victim.trigger.json" --target 9)
        step "erase_${victim}_$preset/record.json" 300 "$python" -m dhbe erase "zoo/$victim.safetensors" --preset "$preset" \
            --out "$out/erase_${victim}_$preset" --resume --quiet $erased $rounds "${known[@]}"
    done
done
if [ "${2:-}" != --smallest ] && [ "${#measured[@]}" -gt 0 ]; then
    step "no record of its own" 1440 "$python" -m dhbe bench run table-3 --scale small --quiet
fi
exit $failed
