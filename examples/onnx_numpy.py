"""Labels of a 16-bit WAV file, with onnxruntime and NumPy alone: python onnx_numpy.py MODEL.onnx CLIP.wav"""

import json
import sys
import wave

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
facts = session.get_modelmeta().custom_metadata_map
rate, window, classes = int(facts["rate"]), int(facts["window"]), json.loads(facts["classes"])
with wave.open(sys.argv[2]) as file:
    assert (file.getframerate(), file.getsampwidth()) == (rate, 2), f"expected {rate} Hz, 16 bits"
    clip = np.frombuffer(file.readframes(-1), "<i2").reshape(-1, file.getnchannels()).mean(1, dtype=np.float32) / 32768
starts = [*range(0, max(1, len(clip) - window), window), max(0, len(clip) - window)]  # the last ends with the clip
windows = np.stack([clip[start : start + window] for start in dict.fromkeys(starts)])
scores = session.run(None, {"waveform": windows})[0].mean(0)
for best in np.argsort(-scores)[:5]:
    print(f"{scores[best]:.4f}  {classes[best]}")
