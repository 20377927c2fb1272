"""The layout of conversations: prompts, and what files claim to be a layout."""

import json

import pytest
from harness import write_toy_dataset

from engine.chat_layout import ChatLayout, Segment, Turn, encode_prompt
from engine.checkpoint import load_model
from engine.checkpoint.contents import Checkpoint
from engine.dataloader import batches as dataloader
from engine.dataloader.batches import TokenDataset
from engine.dataloader.mixture import MixedDataset
from engine.errors import UserError
from engine.tokenizer import Tokenizer, char_spec

LAYOUT = ChatLayout()
OTHER = ChatLayout(user='Q: ', assistant='A: ', end='\n')
TURNS = [Turn('system', 'Be kind.'), Turn('user', 'Hi'), Turn('assistant', 'Hello'),
         Turn('user', 'Bye'), Turn('assistant', 'See you')]


def test_a_prompt_is_what_comes_before_the_answer():
    whole = LAYOUT.segments(TURNS)
    for i in (2, 4):
        prompt = LAYOUT.prompt(TURNS[:i])
        assert whole[:len(prompt)] == prompt
        assert whole[len(prompt):][:2] == [Segment(TURNS[i].text, True), Segment('<|end|>', True)]
    assert ''.join(text for text, counts in whole if counts) == 'Hello<|end|>See you<|end|>'


def test_a_prompt_names_a_character_that_the_vocabulary_lacks():
    tokenizer = Tokenizer(char_spec(set('<|user|>assistant<|end|>Hi'), ends_documents=True))
    ids = encode_prompt(tokenizer, LAYOUT.prompt([Turn('user', 'Hi')]))
    assert tokenizer.decode(ids) == '<|endoftext|><|user|>Hi<|end|><|assistant|>'
    with pytest.raises(UserError, match="character 'o' is not in the vocabulary"):
        encode_prompt(tokenizer, LAYOUT.prompt([Turn('user', 'Ho')]))


def test_a_layout_goes_through_a_file():
    assert ChatLayout.from_dict(json.loads(json.dumps(OTHER.to_dict()))) == OTHER


HOSTILE = [None, [], 'chat', {}, {'user': 'a'}, dict(LAYOUT.to_dict(), more='x'),
           dict(LAYOUT.to_dict(), user=7), dict(LAYOUT.to_dict(), end=''),
           dict(LAYOUT.to_dict(), system='x' * 1000)]


@pytest.mark.parametrize('found', HOSTILE)
def test_what_is_no_layout_is_refused(found):
    with pytest.raises(UserError, match='chat layout'):
        ChatLayout.from_dict(found)


def with_layout(folder, layout):
    """A toy dataset whose meta.json has this layout."""
    write_toy_dataset(folder)
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps(dict(meta, chat=layout)))


def test_datasets_and_checkpoints_refuse_what_is_no_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    with_layout(tmp_path / 'toy', {'user': 7})
    with pytest.raises(UserError, match='meta.json: the chat layout should have .*prepare the'):
        TokenDataset('toy')
    with pytest.raises(UserError, match='out/ckpt.pt: the chat layout should have'):
        load_model.checkpoint_chat(Checkpoint(model_args={}, chat={'user': 7}, path='out/ckpt.pt'))


def test_a_mixture_has_one_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    write_toy_dataset(tmp_path / 'plain')
    with_layout(tmp_path / 'talks', LAYOUT.to_dict())
    with_layout(tmp_path / 'others', OTHER.to_dict())
    mixed = MixedDataset('plain:0.5,talks:0.5')
    assert mixed.chat == LAYOUT.to_dict()
    with pytest.raises(UserError, match='others and talks have conversations in different layouts'):
        MixedDataset('plain:0.4,talks:0.3,others:0.3')
