"""Outgoing and incoming formats: other models' weights, Hugging Face, ONNX, torch.export."""
