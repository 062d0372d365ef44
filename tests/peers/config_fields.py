"""Lists the configuration fields that each family's class in Hugging Face transformers reads, from the
sources of its modelling and configuration files, and writes them with their defaults as the table
crates/model/src/families/reference_fields.json.

usage: python config_fields.py [--add]    (transformers 5.17 or later; run by hand)

With `--add` the fields join those of the table as it is: versions of transformers read different fields,
and a field that any of them reads counts. The table is that of 5.17 and 5.24.

A field counts as read if the text model's code has `config.FIELD`, `self.config.FIELD`,
`getattr(config, "FIELD", ...)` or `kwargs.get("FIELD")`, in the family's own files or in the shared code that every model
runs through (masks and rotary embeddings). Classes that see or hear are left out: their fields
lie in objects of their own. Fields that only training, file handling or output options read are
not listed."""

import ast
import importlib
import json
import pathlib
import re
import sys

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = pathlib.Path(transformers.__file__).parent
REPOSITORY = pathlib.Path(__file__).parents[2]
ROWS = REPOSITORY / "crates/model/src/families/rows.rs"
TABLE = REPOSITORY / "crates/model/src/families/reference_fields.json"
SHARED = ["masking_utils.py"]
# Read by the code for rotary embeddings that all configurations inherit.
ROTARY = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
# Read by the caches that generation makes for every model.
CACHES = {"layer_types", "sliding_window", "attention_chunk_size", "num_kv_shared_layers"}

# Read by the code, but not by what is computed in inference: training, caches, files, outputs, and
# fields of other modalities that shared code looks at.
NO_EFFECT = re.compile(
    r"dropout|pdrop|_jitter|initializer|_implementation$|^output_|^return_dict|^use_cache$|_coef$|"
    r"loss|^problem_type$|^num_labels$|_token_id$|^dtype$|torch_dtype|"
    r"^pretraining_tp$|^to_dict$|^get_text_config$|^model_type$|^name_or_path$|^is_encoder_decoder$|"
    r"^_|^use_return_dict$|^chunk_size_feed_forward$|^quantization_config$|^architectures$|"
    r"^to_diff_dict$|^standardize|^validate|^convert|^ignore_keys|^rope_parameters$|^rope_scaling$|"
    r"_noise$|^config$|^(text|vision|audio)_config$|^(image|video|audio)_token|^update$|^get$|^keys$|^num_logits_to_keep$|^per_layer_config$"
)
OTHER_CLASSES = re.compile(r"Vision|Audio|Image|Video|SequenceClassif|TokenClassif|QuestionAnsw|MultiModal|Projector")


def is_config(node):
    """`config`, `self.config`, `text_config`."""
    if isinstance(node, ast.Name):
        return node.id in ("config", "text_config")
    return isinstance(node, ast.Attribute) and node.attr == "config"


def reads(tree, of_self):
    """Names that the code reads from a configuration; of its own object too in configuration files."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            own = of_self and isinstance(node.value, ast.Name) and node.value.id == "self"
            if is_config(node.value) or own:
                found.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            target, name = node.args[0], node.args[1]
            own = of_self and isinstance(target, ast.Name) and target.id == "self"
            if (is_config(target) or own) and isinstance(name, ast.Constant):
                found.add(name.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            method, target, name = node.func.attr, node.func.value, node.args[0]
            keyed = method in ("get", "pop", "setdefault") and isinstance(target, ast.Name) and target.id == "kwargs"
            if of_self and keyed and isinstance(name, ast.Constant):
                found.add(name.value)
    return found


def classes(path, keep):
    tree = ast.parse(path.read_text())
    return [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and keep(node.name)]


def families():
    text = ROWS.read_text()
    rows = re.findall(r"model_types: &\[(.*?)\],\s*architecture: \"(\w+)\"", text, re.S)
    for kinds, architecture in rows:
        for kind in re.findall(r'"(\w+)"', kinds):
            yield kind, architecture


def fields(architecture):
    """Fields that `architecture` reads, with the defaults of its configuration class."""
    model = getattr(transformers, architecture)
    config = model.config_class
    modelling = ROOT.parent / (model.__module__.replace(".", "/") + ".py")
    configuration = ROOT.parent / (config.__module__.replace(".", "/") + ".py")
    found = set()
    for node in classes(modelling, lambda name: not OTHER_CLASSES.search(name)):
        found |= reads(node, False)
    for node in classes(configuration, lambda name: not OTHER_CLASSES.search(name)):
        found |= reads(node, True)
    for path in SHARED:
        found |= reads(ast.parse((ROOT / path).read_text()), False)
    found |= ROTARY | CACHES
    text = config().get_text_config()
    names = getattr(text, "attribute_map", {})
    declared = vars(text)
    # Another name under which a file may have the field.
    found |= {other for other, name in names.items() if name in found}
    found |= {name for other, name in names.items() if other in found}
    table = {}
    for name in sorted(found):
        if NO_EFFECT.search(name) or callable(getattr(type(text), name, None)):
            continue
        value = declared.get(names.get(name, name))
        # Lists by layer depend on the number of layers; every row reads them.
        table[name] = value if isinstance(value, (type(None), bool, int, float, str)) else None
    return table


def main():
    table, missing = {}, []
    for kind, architecture in families():
        if not hasattr(transformers, architecture):
            missing.append(kind)
            continue
        table[architecture] = fields(architecture)
    version = transformers.__version__
    if sys.argv[1:] == ["--add"]:
        before = json.loads(TABLE.read_text())
        version = f"{before['transformers']}, {version}"
        for name, known in before["classes"].items():
            table[name] = dict(sorted({**table.get(name, {}), **known}.items()))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table))
    TABLE.write_text(f'{{"transformers": "{version}", "classes": {{\n{lines}\n}}}}\n')
    print(f"{len(table)} classes, {sum(map(len, table.values()))} fields; not in transformers: {missing}")


main()
