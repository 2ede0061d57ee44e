#!/bin/sh
# From recordings with Raven selection tables to a classifier, and to detections that open in Raven and Audacity.
#   sh run.sh MODEL OUT [RECORDINGS [SECONDS]]
# MODEL is an encoder: RUN/model of asit pretrain, or a name of asit models. About a minute on two cores. With recordings
# of your own, leave the first command out.
set -e
MODEL=$1 OUT=$2
HERE=$(dirname "$0")

python "$HERE/make_recordings.py" "$OUT" ${3:-12} ${4:-30}
asit evaluate "$MODEL" --data "$OUT/recordings" --window 1 --background --save "$OUT/classifier"
asit tag "$OUT/classifier" "$OUT/new" --window 1 --hop 0.5 --segments --format raven --out "$OUT/selections.txt"
asit tag "$OUT/classifier" "$OUT/new" --window 1 --hop 0.5 --segments --format audacity --out "$OUT/labels" \
  --save-clips "$OUT/clips"
