"""Who may import whom: only downward, and families of one level never each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "quantkit"
LEVELS = [
    {"errors", "resources", "untrusted"},
    {"ambient", "host", "registry", "units"},
    {"core"},
    {"model"},
    {"calibrate"},
    {"train"},
    {"pruners"},
    {"quantizers"},
    {"exporters"},
    {"resilience"},
    {"runtime"},
    {"personal"},
    {"evaluation"},
    {"methods", "modules", "presets", "fields"},
    {"recipe"},
    {"workload"},
    {"costs", "allocation", "conversion", "protection", "provenance", "sparsities"},
    {"limits", "sizes", "fault_plot", "fault_report", "trials"},
    {"campaign"},
    {"planning"},
    {"shares"},
    {"preparation", "output"},
    {"material", "keeping"},
    {"keywords", "pictures", "pipeline"},
    {"merging", "personalization", "pruned"},
    {"api", "catalogue", "display"},
    {"failures", "fault_tables", "flags", "interrupts", "scoreboard"},
    {"running"},
    {"faults_command", "judging", "protect_command", "pruning_command"},
    {"personalize_command"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {family: level for level, families in enumerate(LEVELS) for family in families}
# heavy libraries, and the only files in which each may be imported
CONFINED = {
    "accelerate": {"model/skeleton.py", "runtime/packed_model.py"},
    "compressed_tensors": set(),
    "dp_accounting": {"personal/accounting.py"},
    "peft": {"personal/parameters/lora.py"},
    "sklearn": set(),
    "opacus": set(),
    "datasets": {"calibrate/text.py", "personal/data.py"},
    "gguf": {"exporters/gguf.py"},
    "lm_eval": {"evaluation/harness.py"},
    "pyarrow": {"calibrate/text.py"},
    "matplotlib": {"fault_plot.py"},
    "networkx": {"pruners/random_graph.py"},
    "zstandard": {"sparsities.py"},
    "triton": {"runtime/kernels/_triton_code.py"},
    "transformers": {
        *("calibrate/data.py", "calibrate/self_text.py", "model/rotation.py", "model/skeleton.py"),
        *("runtime/packed_model.py", "personal/delta.py"),
        *(f"evaluation/{name}.py" for name in ("check", "divergence", "generate", "loading", "perplexity")),
    },
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Yield (line, module name) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import hides its layer"
            # `from quantkit import recipe` imports quantkit.recipe
            yield from (
                (node.lineno, f"{node.module}.{alias.name}" if node.module == "quantkit" else node.module)
                for alias in node.names
            )


def family(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    own = family(path)
    for line, module in imported(path):
        if module.startswith("quantkit."):
            other = module.split(".")[1]
            allowed = other == own or LEVEL[other] < LEVEL[own]
            assert allowed, f"{path}:{line}: {own} may not import {module}"


def test_heavy_libraries_stay_in_their_files():
    for path in FILES:
        for line, module in imported(path):
            where = path.relative_to(PACKAGE).as_posix()
            allowed = CONFINED.get(module.split(".")[0], {where})
            assert where in allowed, f"{where}:{line}: {module} belongs in {sorted(allowed)}"
