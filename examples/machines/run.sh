#!/bin/sh
# From recordings of a machine that runs well to anomalies with AUC and an ONNX file; two to three minutes on two cores.
#   sh run.sh FOLDER [CLIPS [EPOCHS]]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" && cd "$1"

python "$here/make_sounds.py" . "${2:-60}"
asit pretrain --data normal --out run --views.seconds 1 --batch-size 8 --epochs "${3:-20}"
asit index run/model normal --out normal-index
asit anomaly normal-index test.csv --out anomalies.csv
asit export run/model --to onnx --out machine.onnx
