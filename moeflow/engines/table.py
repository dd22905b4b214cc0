"""What each engine runs of what moeflow writes, what it keeps in memory, and where each of that is known from."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Engine:
    """One engine that loads a result, on so many devices."""

    name: str
    counts: bool
    """Layers may differ in their number of experts."""
    ranks: bool
    """Experts may be products of two matrices."""
    gone: bool
    """Layers may lack their MoE block."""
    routing: bool
    """Tokens may skip experts, and Compressed Experts may stand for some."""
    bits: tuple[int, ...]
    """The bits of packed experts that it loads."""
    groups: tuple[int, ...] | None
    """How many packed weights may share a scale, 0 for a whole row; None: any number."""
    zeros: tuple[int, ...]
    """The bits of packed experts that may have zero points beside their scales."""
    mixed: bool
    """Layers may differ in their bits, and packed layers lie beside whole ones."""
    unpacks: bool
    """Packed experts take their unpacked bytes in memory."""
    even: bool
    """Expert parallelism needs counts that its ranks divide."""
    spreads: bool
    """Expert parallelism runs whatever else runs; otherwise whole experts only."""
    sources: Mapping[str, str]
    """Where each of these is known from, by the name of the field."""
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By model type, the numbers of experts that a kernel of its router was compiled for; another number crashes."""
    tp: int = 1
    """The tensor-parallel size: so many devices share each expert."""
    ep: int = 1
    """The expert-parallel size: over so many devices experts are spread, each of them whole."""
    model_type: str = ""
    """The family that is to be loaded, where it matters."""

    @property
    def word(self) -> str:
        """What `engine_of` makes this of again."""
        return self.name + f",tp={self.tp}" * (self.tp > 1) + f",ep={self.ep}" * (self.ep > 1)

    def why_not_count(self, experts: int) -> str:
        """Why no layer of the family may have so many experts; "" if it may."""
        compiled = self.kernels.get(self.model_type)
        if compiled and experts not in compiled:
            near = min(compiled, key=lambda n: (abs(n - experts), n))
            return (
                f"{self.name} has no kernel for {experts} experts of a {self.model_type} ({self.sources['kernels']}); take {near}"
            )
        if self.even and experts % self.ep:
            low = experts - experts % self.ep
            others = " or ".join(str(n) for n in (low, low + self.ep) if n)
            return f"ep={self.ep} does not divide {experts} experts ({self.sources['even']}); take {others} of them, or another ep"
        return ""

    def why_not_width(self, width: int | None, group: int = 0) -> str:
        """Why experts of so many inner units, packed in such groups (0: none), are not divided over devices; "" if they are."""
        if width is None or self.tp == 1 or self.ep > 1:  # with expert parallelism an expert is whole
            return ""
        if width % self.tp:
            return f"tp={self.tp} does not divide the {width} inner units of an expert; take a divisor, or ep={self.tp}"
        if group and width // self.tp % group:
            return (
                f"tp={self.tp} leaves {width // self.tp} of an expert's {width} inner units on a device, and groups of {group} "
                "do not divide them; take smaller groups, or expert parallelism (ep)"
            )
        return ""


CPU = "tried with vLLM 0.32 on a CPU, equal to transformers for 64 of 64 greedy tokens or refused"
ROUTER = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)
"""The numbers of experts that vLLM's router kernel for the square root of softplus was compiled for."""

ENGINES: Mapping[str, Engine] = {
    "transformers": Engine(
        "transformers", counts=False, ranks=False, gone=False, routing=False, bits=(8, 4), groups=None, zeros=(), mixed=False,
        unpacks=True, even=True, spreads=True,
        sources={
            "counts": "transformers 5.23, measured: its classes have one number of experts",
            "ranks": "transformers 5.23, measured: its classes have whole matrices only",
            "gone": "transformers 5.23, measured: its classes have a MoE block in every layer that config.json gives one",
            "routing": "transformers 5.23, measured: its routers know no thresholds",
            "bits": "compressed-tensors 0.20, measured by tests/methods/slim/test_loading.py",
            "groups": "compressed-tensors 0.20, measured by tests/methods/slim/test_loading.py",
            "zeros": "transformers 5.23, quantizer_compressed_tensors.py: no converter stacks zero points of experts",
            "mixed": "transformers 5.23, measured: it unpacks experts of one scheme",
            "unpacks": "transformers 5.23, measured: fused experts are dequantized while they are loaded",
            "spreads": "transformers 5.23, measured: packed experts are whole ones once they are loaded, and no other form is",
            "even": "transformers 5.23, integrations/tensor_parallel.py: experts are cut into equal shards",
        },
    ),
    "moeflow": Engine(
        "moeflow", counts=True, ranks=True, gone=True, routing=True, bits=(8, 4, 3, 2), groups=None, zeros=(8, 4, 3, 2), mixed=True,
        unpacks=True, even=False, spreads=True,
        sources=dict.fromkeys(
            ("counts", "ranks", "gone", "routing", "bits", "groups", "zeros", "mixed", "unpacks", "even", "spreads"),
            "moeflow.model.compressed on transformers 5.23, measured by this project's tests",
        ),
    ),
    "vllm": Engine(
        "vllm", counts=False, ranks=False, gone=False, routing=False, bits=(8, 4), groups=(0, 32, 64, 128), zeros=(4,),
        mixed=False, unpacks=False, even=True, spreads=True, kernels={"deepseek_v4": ROUTER},
        sources={
            "counts": f"{CPU}: one num_experts a model",
            "ranks": f"{CPU}: no kernel for factors",
            "gone": f"{CPU}: model type moeflow_... is not recognized",
            "routing": f"{CPU}: model type moeflow_... is not recognized",
            "bits": "vLLM 0.32, fused_moe/oracle/int_wna16.py and marlin_utils.py: uint4b8 and uint8b128, read and not run",
            "groups": "vLLM 0.32, marlin_utils.py, check_moe_marlin_supports_config: 32, 64, 128 and one scale a row",
            "zeros": "vLLM 0.25 and newer (pull request 44025); 0.32, query_marlin_supported_quant_types: uint4 alone",
            "mixed": "moeflow writes layers that differ as a model type of its own, which vLLM does not recognize",
            "unpacks": "vLLM 0.32, compressed_tensors_moe_wna16.py: weights stay packed",
            "spreads": "vLLM 0.32, compressed_tensors_moe_wna16.py: an expert map for packed ones, too, read and not run",
            "even": "vLLM 0.32, fused_moe/layer.py: load balancing (EPLB) refuses a remainder, which else loads ranks unevenly",
            "kernels": "vLLM issue 51521 and pull request 50982",
        },
    ),
    "vllm-moeflow": Engine(
        "vllm-moeflow", counts=True, ranks=True, gone=True, routing=True, bits=(8, 4, 3, 2), groups=None, zeros=(8, 4, 3, 2),
        mixed=True, unpacks=True, even=True, spreads=False, kernels={"deepseek_v4": ROUTER},
        sources={
            **dict.fromkeys(("counts", "ranks", "gone", "routing"), f"moeflow's plug-in; {CPU}"),
            **dict.fromkeys(("bits", "groups", "zeros"), "moeflow's plug-in unpacks them; where vLLM has a kernel, not"),
            **dict.fromkeys(("mixed", "unpacks"), "moeflow's plug-in unpacks them; where vLLM has a kernel, not"),
            "spreads": "moeflow/serve/plugin.py, settle: the general way refuses --enable-expert-parallel",
            "even": "moeflow's plug-in divides experts over ranks where their counts divide",
            "kernels": "vLLM issue 51521 and pull request 50982",
        },
    ),
    "sglang": Engine(
        "sglang", counts=False, ranks=False, gone=False, routing=False, bits=(8, 4), groups=(0, 32, 64, 128), zeros=(),
        mixed=False, unpacks=False, even=True, spreads=True,
        sources={
            **dict.fromkeys(("counts", "ranks", "gone", "routing"), "SGLang 0.5, read and not run: one number of experts a model"),
            "bits": "SGLang 0.5, compressed_tensors_wNa16_moe.py: 4 and 8 bits by Marlin, read and not run",
            "groups": "SGLang 0.5, marlin_utils.py: 32, 64, 128 and one scale a row, read and not run",
            "zeros": "SGLang 0.5, compressed_tensors_wNa16_moe.py: symmetric weights only, read and not run",
            "mixed": "moeflow writes layers that differ as a model type of its own, which SGLang does not know",
            "unpacks": "SGLang 0.5, compressed_tensors_wNa16_moe.py: weights stay packed, read and not run",
            "spreads": "SGLang 0.5, compressed_tensors_wNa16_moe.py: an expert map for packed ones, too, read and not run",
            "even": "SGLang 0.5, fused_moe_triton/layer.py: the number of experts must be a multiple of ep_size, read and not run",
        },
    ),
    "llama.cpp": Engine(
        "llama.cpp", counts=False, ranks=False, gone=False, routing=False, bits=(8, 4, 2), groups=(16, 32, 64, 128),
        zeros=(8, 4, 2), mixed=False, unpacks=True, even=False, spreads=True,
        sources={
            **dict.fromkeys(("counts", "ranks", "gone", "routing"), "llama.cpp's convert_hf_to_gguf.py: one expert_count a model"),
            **dict.fromkeys(("bits", "groups", "zeros"), "llama-cpp-python 0.3.36, conversion/base.py; make test-gguf"),
            "mixed": "llama.cpp's conversion/base.py: one group of compressed-tensors, or it is refused",
            "unpacks": "llama.cpp's conversion/base.py: weights are unpacked; llama-quantize packs them in formats of its own",
            "spreads": "llama.cpp splits rows or layers over devices, not experts",
            "even": "llama.cpp splits rows or layers over devices, not experts",
        },
    ),
}  # fmt: skip
"""transformers alone, transformers after `import moeflow`, vLLM as it is and with moeflow's plug-in, SGLang, and llama.cpp."""


def engine_of(word: str, *, tp: int = 1, ep: int = 1, model_type: str = "") -> Engine:
    """The engine of a name, such as vllm, and its parallel sizes, which the word may have, too: `vllm,tp=4,ep=4`.

    Raises ValueError for what is none.
    """
    name, *sizes = word.split(",")
    if name not in ENGINES:
        raise ValueError(f"engine={name!r}: choose one of {', '.join(ENGINES)}")
    given = {"tp": tp, "ep": ep}
    for size in sizes:
        if (match := re.fullmatch(r"(tp|ep)=([1-9][0-9]{0,4})", size)) is None:
            raise ValueError(f"engine={word!r}: {size!r} is no parallel size; write it like {name},tp=4 or {name},ep=4")
        given[match[1]] = int(match[2])
    for key, value in given.items():
        if value < 1:
            raise ValueError(f"{key}={value}: so many devices share the experts; give at least 1")
    engine = replace(ENGINES[name], tp=given["tp"], ep=given["ep"], model_type=model_type)
    if engine.ep > 1 and not engine.spreads:
        engine = replace(engine, ranks=False, gone=False, routing=False, bits=(), mixed=False)
    return engine


def engine_word(name: str, tp: int, ep: int) -> str:
    """An engine and its sizes as one word, "" for none. Raises ValueError for sizes of no engine, and for what is no engine."""
    if not name and (tp, ep) != (1, 1):
        raise ValueError("--tp and --ep are sizes of an engine: say which, as in --engine vllm")
    return engine_of(name, tp=tp, ep=ep).word if name else ""
