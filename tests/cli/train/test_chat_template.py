"""`--chat_template`: Jinja text or a file in place of the tokenizer's own, saved with the model."""

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


def test_a_template_is_trained_with_and_saved(
    run: Callable[..., tuple[int, str, str]], write: Callable[..., str], model_dir: str, tmp_path: Path
):
    turns = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "yes"), ("rejected", "no"))}
    path = write("pairs.jsonl", {"prompt": [{"role": "user", "content": "Q?"}], **turns})
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    words = ["-m", model_dir, "-d", path, "--max_steps", "1", "--use_cpu", "--save_strategy", "no"]
    for given in (TEMPLATE, str(tmp_path / "own.jinja")):
        out = tmp_path / "out"
        code, _, stderr = run(*words, "--output_dir", out, "--chat_template", given)
        assert code == 0, stderr
        saved = AutoTokenizer.from_pretrained(out)
        assert saved.chat_template == TEMPLATE
    assert AutoTokenizer.from_pretrained(model_dir).chat_template != TEMPLATE
    code, _, stderr = run(*words, "--output_dir", tmp_path / "out", "--chat_template", "gone.jinja")
    assert code == 2
    assert "--chat_template gone.jinja is neither Jinja text nor a file that can be read" in stderr
