#!/usr/bin/env bash
# Does a mask and an objective of one's own help? Two runs that differ in these alone, scored on the same labelled clips.
#   bash examples/research/walk.sh TABLE.csv [SETTING ...]     # TABLE.csv: path, label, and split or fold
# Writes plain/, own/, plain.json and own.json in the working directory. About two minutes for 1,000 short clips on two
# cores. To track the runs elsewhere too, add --records.trackers tensorboard wandb (pip install wandb).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
data=$1
shift
own=(--custom.mask "parts:Spans(share=0.6, columns=4)" --custom.objective parts:TeacherTokens)

asit pretrain --data "$data" --out plain --config "$here/walk.yaml" "$@"
asit pretrain --data "$data" --out own --config "$here/walk.yaml" "${own[@]}" --records.trackers tensorboard "$@"
asit evaluate plain/model --data "$data" --probe linear --out plain.json
asit evaluate own/model --data "$data" --probe linear --out own.json
asit compare plain.json own.json
