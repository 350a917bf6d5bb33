#!/bin/sh
# From a wheel to the feature page of a model of one's own: commands only, in an empty folder, and no Python.
#
#     sh tests/newcomer.sh [MODEL]        MODEL: a model's folder (default: smollm2-135m, which `saenb fetch` brings)
#
# SAENB names the command (default: saenb, as `pip install` puts it on the path), LAYER the layer, TOKENS, STEPS and ROWS the budget.
# With ASK_FORGET and ASK_RETAIN, two files of questions, the records have a score as well.
set -eu
SAENB=${SAENB:-saenb}
MODEL=${1:-}
if [ -z "$MODEL" ]; then MODEL=$($SAENB fetch smollm2-135m --json | sed -n 's/.*"folder": "\(.*\)".*/\1/p'); fi
say() { printf '\n$ saenb %s\n' "$*"; $SAENB "$@"; }

# two subjects, as a beginner might write them down
texts() { i=0; while [ $i -lt 400 ]; do printf "$1\n" $i $((i % 7)) $((i % 13)); i=$((i + 1)); done; }
[ -e forget.txt ] || texts 'Virus number %d has %d genes, and enters a cell by its protein %d, which a doctor can measure in blood.' > forget.txt
[ -e retain.txt ] || texts 'House number %d has %d rooms, and is reached by road %d, on which many people walk to the market.' > retain.txt

# a model, a layer and texts make a store, and a store makes a dictionary
say harvest store --model "$MODEL" --layer "${LAYER:-1}" --texts forget.txt:forget retain.txt:retain --tokens "${TOKENS:-20000}"
say train store mine --steps "${STEPS:-200}" --batch 256
# where a few dimensions hold most of the variance, all can count alike; what is saved reads the stream as it is
say train store alike --steps "${STEPS:-200}" --batch 256 --normalise dimension

# a preset makes records; its sizes are made smaller here, as an editor would
[ -z "${ASK_FORGET:-}" ] || set -- --ask-forget "$ASK_FORGET" --ask-retain "$ASK_RETAIN" --asked continuation
[ -n "${ASK_FORGET:-}" ] || set --
say preset new my.toml --model "$MODEL" --layer "${LAYER:-1}" "$@"
sed -i.before -e "s/200_000/${TOKENS:-20000}/" -e "s/steps = 1000/steps = ${STEPS:-200}/" -e 's/batch = 1024/batch = 256/' \
    -e "s/dataset_size = 128/dataset_size = ${ROWS:-24}/" my.toml
say check --preset my.toml
for made in mine alike; do say eval $made --preset my.toml --evals core; done
say run contrastive/1 --preset my.toml
say run contrastive/0 --preset my.toml
say compare runs/my/contrastive
say explore runs/my/contrastive/run_1/seed_0 --preset my.toml --contexts 3 --effects 4
ls -l features.html my.toml mine/sae/cfg.json runs/my/contrastive/run_1/seed_0/notes.md
