"""The layout of conversations in an exported folder: for transformers, and for our own scripts."""

import json
from dataclasses import replace

import pytest
from test_export import trained_model

from engine.chat_layout import ChatLayout, Turn, encode_prompt
from engine.checkpoint.load_model import load_model
from engine.errors import UserError
from engine.hf import save_pretrained
from engine.hf.tokenizer_json import add_tokens, train_bpe
from engine.tokenizer import Tokenizer, char_spec
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')

LAYOUT = ChatLayout()
QUOTED = ChatLayout(system='{{s', user='"u\\n', assistant="{%'a", end='\\e')
TURNS = [Turn('system', 'Be kind.'), Turn('user', 'Why?'), Turn('assistant', 'So.'),
         Turn('user', 'Is {{ it }} <so>?')]
TEXT = ''.join(text for _, text in TURNS)


DAMAGED = [
    (7, 'should have only'),
    ({'other': 1}, 'should have only'),
    ({'special_tokens': 'yes'}, 'special_tokens of its plaingpt is a str'),
    ({'end_of_text': -1}, 'is below 0'),
    ({'chat': {'user': 'u'}}, 'chat layout should have'),
]


def spec_of(kind, layout):
    markers = [*layout.to_dict().values()]
    if kind == 'char':
        return char_spec(set(TEXT + ''.join(markers)), ends_documents=True)
    spec = train_bpe([TEXT * 3], 270)
    if kind == 'markers are tokens':
        spec = replace(add_tokens(spec, markers), special_tokens=True)
    return spec


def export(folder, spec, layout):
    config = GPTConfig(32, spec.vocab_size, n_layer=1, n_head=1, n_embd=8)
    trained = trained_model(config, spec)
    trained.chat = layout
    save_pretrained.write(folder, trained)


@pytest.mark.parametrize('kind, layout', [
    ('char', LAYOUT), ('char', QUOTED),
    ('markers are tokens', LAYOUT), ('markers are tokens', QUOTED)])
def test_transformers_writes_a_conversation_with_the_tokens_of_training(tmp_path, kind, layout):
    spec = spec_of(kind, layout)
    export(tmp_path / 'hf', spec, layout)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    messages = [dict(role=role, content=text) for role, text in TURNS]
    found = exported.apply_chat_template(messages, add_generation_prompt=True)['input_ids']
    assert found == encode_prompt(Tokenizer(spec), layout.prompt(TURNS))


def test_no_template_is_written_where_text_changes_the_tokens_of_markers(tmp_path):
    export(tmp_path / 'hf', spec_of('markers are text', LAYOUT), LAYOUT)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    assert exported.chat_template is None


@pytest.mark.parametrize('kind', ['char', 'markers are tokens', 'markers are text'])
def test_our_scripts_know_the_layout_of_an_exported_folder(tmp_path, kind):
    spec = spec_of(kind, LAYOUT)
    export(tmp_path / 'hf', spec, LAYOUT)
    loaded = load_model(GPT, str(tmp_path / 'hf'), 'none')
    assert loaded.chat == LAYOUT
    prompt = LAYOUT.prompt(TURNS)
    assert encode_prompt(Tokenizer(loaded.spec), prompt) == encode_prompt(Tokenizer(spec), prompt)

    path = tmp_path / 'hf' / 'tokenizer_config.json'
    config = json.loads(path.read_text())
    for field, words in DAMAGED:
        path.write_text(json.dumps(config | {'plaingpt': field}))
        with pytest.raises(UserError, match=words):
            load_model(GPT, str(tmp_path / 'hf'), 'none')
