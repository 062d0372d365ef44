"""Expected prompts of the chat templates under crates/model/tests/fixtures/chat, from Hugging Face
transformers. usage: python chat_fixture.py (writes expected.json there; needs transformers, jinja2)

Each entry is the prompt, or {"refused": message} where the template raises."""
import json, pathlib
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

folder = pathlib.Path(__file__).parents[2] / "crates/model/tests/fixtures/chat"
conversations = json.loads((folder / "conversations.json").read_text())
tokens = {"bos_token": "<s>", "eos_token": "</s>"}
expected = {}
for path in sorted(folder.glob("*.jinja")):
    outputs = expected[path.stem] = {}
    for conversation in conversations:
        # A fixed date: what strftime_now prints is tested on its own.
        options = {"date_string": "26 Jul 2024"} | tokens | conversation.get("extra", {})
        try:
            prompts, _ = render_jinja_template(
                conversations=[conversation["messages"]], chat_template=path.read_text(),
                add_generation_prompt=conversation["add_generation_prompt"], **options)
            outputs[conversation["name"]] = prompts[0]
        except TemplateError as error:
            outputs[conversation["name"]] = {"refused": str(error)}
(folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")
print({name: len(outputs) for name, outputs in expected.items()})
