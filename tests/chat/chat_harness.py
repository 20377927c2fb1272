"""A small model with random weights that may answer, for the tests of engine/chat."""

import string

import torch

from engine.chat.chat_model import AnswerSettings, ChatModel
from engine.chat_layout import ChatLayout
from engine.tokenizer import Tokenizer, char_spec
from model import GPT, GPTConfig

SPEC = char_spec(set(string.printable[:95] + '\né'), ends_documents=True)
LAYOUT = ChatLayout()
SETTINGS = AnswerSettings(temperature=0.8, top_k=200, top_p=1.0, min_p=0.0,
                          repetition_penalty=1.0, max_new_tokens=20)


def make_model(block_size=256, **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, SPEC.vocab_size, 2, 2, 32, tied=False, **options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:                         # far from uniform, so that mistakes show
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():                               # answers do not end by themselves
        model.transformer.ln_f.bias[0] = 10
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[SPEC.end_of_text, 0] = -10
    return model


def make_chat_model(model=None, layout=LAYOUT, seed=1):
    return ChatModel(model or make_model(), Tokenizer(SPEC), layout, seed)
