"""Trained encoders in other libraries' formats, each read back by that library and compared."""

TARGETS = {
    "timm": "a folder for timm.create_model('local-dir:FOLDER', pretrained=True)",
    "hf": "a folder for transformers.AutoModel.from_pretrained(FOLDER)",
    "onnx": "encoder.onnx, any batch, height and width",
    "safetensors": "encoder.safetensors with its architecture, for dune_fast.load_encoder",
    "radio": "radio.pth.tar, the container of RADIO's releases, with heads in the teachers' own scale",
    "theia": "model.safetensors by the names of Theia's released models, encoder and translators",
    "dune": "dune.pth, the container of DUNE's published checkpoints, with projectors and statistics",
}
"""What each target writes."""
