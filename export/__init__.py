"""How passes become files that other runtimes execute: ONNX graphs, and TensorRT engines made of them.

Installed as `ddengine.export`. Light on purpose (no torch, onnx or tensorrt here).
"""

__version__ = "0.0.0"
