"""Conversations to train on, to data/chat: your own, or a set that is made here by rules.

    python data/chat/prepare.py                                 # the set that is made by rules
    python data/chat/prepare.py --input=chats.jsonl --vocab_size=4096
    python data/chat/prepare.py --tokenizer=gpt2 --name=chat_gpt2    # for finetune_chat

The set needs no download. A part of its questions is held out: train.bin has none of them, and
held_out.jsonl has them with their right answers, for `evaluate.py --chat=True` and for
`sample.py --prompts`.
"""

import json
import sys
from pathlib import Path
from random import Random

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, report_errors

import configurator
from data.chat import rules
from data.text import prepare as text_dataset
from engine.atomic_files import atomic_write
from engine.chat_layout import ChatLayout

input = ''              # conversations of your own: rows with messages, or with a question and an
                        # answer, in files that data/text/prepare.py reads; '' makes them by rules
name = 'chat'           # name of the dataset, a folder in data/
tokenizer = 'bpe'       # 'bpe', 'gpt2', 'char', or a folder or hub name, as for
                        # data/text/prepare.py; 'bpe' and 'gpt2' get a token for each marker of a
                        # conversation
vocab_size = 257        # how many tokens 'bpe' trains; 257 are the bytes and the end of a text
val_fraction = 0.1      # share of your own conversations that is held out as val.bin
# the set that is made by rules
conversations = 12_000  # how many conversations to train on
held_out = 1000         # how many questions are held out, at most
seed = 0                # seed of the questions

SHARE_OF_KEYS = 0.1     # of what can be asked, how much is held out
LENGTHS = (1, 1, 2, 2, 3, 4)        # questions in a conversation, each as likely as the others
SHARE_WITH_A_NAME = 0.15            # of conversations, in which the user asks for the own name
SHARE_WITH_A_TOLD_NAME = 0.75       # of these, in which the user has told it
DRAWS_PER_HELD_OUT = 100            # how many questions are drawn in search of one


def check_settings():
    configurator.check_range(globals(), 'conversations held_out', 10, 10 ** 7)


# The set

def draw_held_out(random):
    """Different questions that are held out, `held_out` of them or as many as are found."""
    questions = {}
    for _ in range(held_out * DRAWS_PER_HELD_OUT):
        question = rules.ask(random)
        if rules.is_held_out(question.key, SHARE_OF_KEYS, seed):
            questions.setdefault(question.text, question)
        if len(questions) == held_out:
            break
    return list(questions.values())


def draw_to_train(random, kind=None):
    """A question that is not held out, of any kind where none is named."""
    while True:
        question = rules.ask(random, kind)
        if not rules.is_held_out(question.key, SHARE_OF_KEYS, seed):
            return question


def draw_conversation(random):
    """The Questions of a conversation to train on. Some end with a question for the user's name."""
    questions = [draw_to_train(random) for _ in range(random.choice(LENGTHS))]
    if random.random() < SHARE_WITH_A_NAME:
        if random.random() < SHARE_WITH_A_TOLD_NAME:
            place = random.randint(0, len(questions))
            questions.insert(place, draw_to_train(random, rules.tell_name))
        questions.append(rules.ask_for_name(random, questions))
    return questions


def as_row(questions):
    """A row of a file of conversations."""
    messages = []
    for question in questions:
        messages.append(dict(role='user', content=question.text))
        messages.append(dict(role='assistant', content=question.answer))
    return dict(messages=messages)


def make_set(folder):
    """Write train.jsonl, val.jsonl and held_out.jsonl to the folder."""
    random = Random(seed)
    asked = draw_held_out(random)
    train = [as_row(draw_conversation(random)) for _ in range(conversations)]
    val = [as_row(random.choices(asked, k=random.choice(LENGTHS))) for _ in asked]
    questions = [dict(prompt=question.text, answer=question.answer, kind=question.kind)
                 for question in asked]

    folder.mkdir(exist_ok=True)
    for file_name, rows in (('train', train), ('val', val), ('held_out', questions)):
        with atomic_write(folder / f'{file_name}.jsonl') as file:
            for row in rows:
                file.write(json.dumps(row) + '\n')
    print0(f'{folder}: held_out.jsonl has {len(asked):,} questions with their answers, of which '
           f'train.bin has none')


# The dataset

def text_flags(folder):
    """The flags with which data/text/prepare.py writes the dataset."""
    flags = [f'--tokenizer={tokenizer}', f'--vocab_size={vocab_size}']
    if tokenizer in ('bpe', 'gpt2'):
        markers = ChatLayout().to_dict().values()
        flags.append(f'--add_tokens={",".join(markers)}')
    if input:
        return [*flags, f'--input={input}', f'--val_fraction={val_fraction}']
    return [*flags, f'--input={folder / "train.jsonl"}', f'--val_input={folder / "val.jsonl"}']


def main():
    check_settings()
    configurator.configure(vars(text_dataset), [f'--name={name}'])
    folder = FOLDER
    if name != FOLDER.name:
        folder = text_dataset.dataset_folder()      # which has no script of its own
    configurator.configure(vars(text_dataset), text_flags(folder))
    text_dataset.check_settings()
    if not input:
        make_set(folder)
    text_dataset.write_dataset(folder, only_chats=True)
    if input:                                           # those of an earlier set
        (folder / 'held_out.jsonl').unlink(missing_ok=True)
    print0(f'next: {next_command()}')


def next_command():
    """The command that trains on the dataset."""
    config = 'train_chat'
    usual_name = 'chat'
    if tokenizer == 'gpt2':
        config = 'finetune_chat'
        usual_name = 'chat_gpt2'
    command = f'python train.py config/{config}.py'
    if name != usual_name:
        command += f' --dataset={name} --out_dir=out-{name}'
    return command


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:], path_setting='input')
        main()
