"""Does vLLM's own parser take the folders that `lathe quantize` says it runs, and refuse the others?

usage: vllm_schemes.py LATHE [PRESET ...]      (needs what folders.py needs, and vLLM 0.33 importable: its unpacked wheel will do)

The folders are those of folders.py. `CompressedTensorsConfig` reads each `quantization_config`, finds the scheme of every fused and
single linear layer, and the method for experts; no kernel runs and no weight is read. What vLLM imports and is not installed here is
replaced by mocks, and the schemes themselves by their names.
"""

import contextlib
import importlib.abc
import importlib.machinery
import json
import pathlib
import sys
import tempfile
import types
from unittest.mock import MagicMock

import torch
import torch._dynamo  # noqa: F401 - what torch and transformers look for is looked for before there are mocks
from folders import MODELS, PRESETS, calibration, make, run

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"],
         "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}
LAYERS = {
    "dense": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "mixture": ["self_attn.qkv_proj", "self_attn.o_proj"],
    "latent": ["self_attn.fused_qkv_a_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj",
               "mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj"],
}
# Looking for these tells vLLM what it runs on.
PLATFORMS = {"libtpu", "tpu_inference", "amdsmi", "pynvml", "torch_xla", "triton", "ray", "flashinfer", "deep_gemm", "aiter",
             "triton_kernels", "torchao"}


class Mock(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        found = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Mocks for modules that are not installed and that vLLM itself imports."""

    def find_spec(self, name, path, target=None):
        top = name.split(".")[0]
        frame = sys._getframe(1)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        asks = path is not None or (frame and "vllm" in frame.f_code.co_filename)
        ours = top in sys.modules and not isinstance(sys.modules[top], Mock)
        if top == "vllm" or top in PLATFORMS or top in sys.stdlib_module_names or not asks or ours:
            return None
        if importlib.machinery.PathFinder.find_spec(top) is not None:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Mock(spec.name)

    def exec_module(self, module):
        pass


def named(name):
    """A stand-in for a scheme: it is made of anything, and needs no GPU."""
    return type(name, (), {"__init__": lambda self, *_, **__: None, "get_min_capability": classmethod(lambda cls: 0)})


class RoutedExperts(torch.nn.Module):
    ckpt_gate_proj_name, ckpt_up_proj_name, ckpt_down_proj_name = "gate_proj", "up_proj", "down_proj"
    moe_config = None


def parser():
    sys.meta_path.append(Missing())
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as linear
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import compressed_tensors_moe as experts

    for name in list(vars(linear)):
        if name.startswith("CompressedTensorsW"):
            setattr(linear, name, named(name))
    folder = pathlib.Path(experts.__file__).parent
    for path in folder.glob("compressed_tensors_moe_*.py"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(f"{experts.__package__}.{path.stem}")
            for name in list(vars(module)):
                if name.startswith("CompressedTensorsW") and name.endswith("MoEMethod"):
                    setattr(module, name, named(name))
    experts.UnquantizedFusedMoEMethod = named("UnquantizedFusedMoEMethod")
    return linear.CompressedTensorsConfig, experts.CompressedTensorsMoEMethod


def schemes(config_class, experts_class, folder, kind):
    """The names of what vLLM takes for each layer, or its words of refusal."""
    config = config_class.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.packed_modules_mapping = FUSED
    found = set()
    for layer in LAYERS[kind]:
        scheme = config.get_scheme(torch.nn.Linear(1, 1), f"model.layers.1.{layer}")
        found.add(type(scheme).__name__.removeprefix("CompressedTensors"))
    if kind != "dense":
        method = experts_class.get_moe_method(config, RoutedExperts(), "model.layers.1.mlp.experts")
        assert type(method).__name__ != "UnquantizedFusedMoEMethod", "experts are not quantized"
        found.add(type(method).__name__.removeprefix("CompressedTensors"))
    return found


def main(lathe, *presets):
    config_class, experts_class = parser()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for kind in MODELS:
            plain = scratch / kind
            make(kind, plain)
            for preset in presets or PRESETS:
                if preset == "hadamard":
                    continue
                small = scratch / f"{kind}-{preset}"
                words = ["--format", preset, *calibration(scratch, preset), "--json"]
                refusal = run(lathe, "quantize", plain, small, *words)["readers"]["vllm"]
                try:
                    found = ", ".join(sorted(schemes(config_class, experts_class, small, kind)))
                    runs = True
                except (ValueError, NotImplementedError, RuntimeError, AttributeError, AssertionError) as error:
                    found, runs = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}", False
                good = runs == (refusal is None)
                wrong += not good
                print(f"{'ok ' if good else 'BAD'} {kind} {preset}: vLLM {found}; Lathe says {refusal or 'runs'}", flush=True)
    assert wrong == 0, f"{wrong} folders are not what `readers` says"


if __name__ == "__main__":
    main(*sys.argv[1:])
