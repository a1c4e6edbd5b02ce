"""ONNX: files as sources and results, and the export of modules."""
