"""ddengine for the Python backend of NVIDIA Triton Inference Server, which alone imports this file (../../README.md).

One engine an instance. A request's edit is stopped within one step once its client has cancelled it.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ddengine.config import DirectDragConfig
from ddengine.engine import Engine
from ddengine.errors import BackendUnavailable, Cancelled, DDEngineError, InputError
from ddengine.progress import Progress

log = logging.getLogger(__name__)

STAGES = ("load", "encode", "invert", "reference", "warp", "drag", "denoise", "decode", "total")  # of `timings`


class TritonPythonModel:
    """What the server makes once an instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that config.pbtxt's parameters name and make one edit, so that ready means ready."""
        found = json.loads(args["model_config"]).get("parameters", {})
        options = {name: value["string_value"] for name, value in found.items()}
        self.device = "cpu"
        if args["model_instance_kind"] == "GPU":
            self.device = f"cuda:{args['model_instance_device_id']}"
        self.engine = Engine.load(
            options.get("model", "embedded"),
            backend=options.get("backend", "auto"),
            device=self.device,
            dtype=options.get("dtype", "auto"),
        )
        ramp = np.linspace(0, 255, 64, dtype=np.uint8)
        picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128), -1).astype(np.uint8)
        config = DirectDragConfig.preset("preview", n_inference_step=2, drag_end_step=1, track_per_step=1)
        self.engine.edit(picture, [((24, 32), (40, 32))], config=config)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in their order; a request's own fault is its answer and no other's."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Let go of the weights."""
        del self.engine

    def _answer(self, request: Any) -> Any:
        error = pb_utils.TritonError
        try:
            return pb_utils.InferenceResponse(output_tensors=self._edit(request))
        except InputError as fault:
            code, message = error.INVALID_ARG, str(fault)
        except Cancelled:
            code, message = error.CANCELLED, "cancelled"
        except BackendUnavailable as fault:
            code, message = error.UNAVAILABLE, str(fault)
        except DDEngineError as fault:
            code, message = error.INTERNAL, str(fault)
        except Exception as fault:  # a mistake of ours, or memory ran out: the instance and its other requests go on
            log.exception("an edit failed")
            code = error.INTERNAL
            message = f"the edit failed unexpectedly ({type(fault).__name__}); the server's log says more"
        return pb_utils.InferenceResponse(error=error(message, code))

    def _edit(self, request: Any) -> list[Any]:
        drags, seed = _input(request, "drags"), _input(request, "seed")
        assert drags is not None  # the server lets no request through that lacks a required input
        config = json.loads(request.parameters() or "{}").get("config")  # a preset's name, a parameter of the request

        def stop_if_cancelled(_: Progress) -> None:
            if request.is_cancelled():
                raise Cancelled("the client has cancelled the request")

        result = self.engine.edit(
            _input(request, "image"),
            [((x0, y0), (x1, y1)) for x0, y0, x1, y1 in drags.astype(float)],
            seed=0 if seed is None else int(seed[0]),
            config=None if config is None else str(config),
            progress=stop_if_cancelled,
        )
        return [
            pb_utils.Tensor("image", np.asarray(result.image)),
            pb_utils.Tensor("points", np.asarray(result.handles, np.float32).reshape(-1, 2)),
            pb_utils.Tensor("timings", np.array([result.timings.get(stage, 0.0) for stage in STAGES], np.float32)),
        ]


def _input(request: Any, name: str) -> np.ndarray | None:
    """A tensor of the request, None for an optional one that was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()
