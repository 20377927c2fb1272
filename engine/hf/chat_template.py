"""The layout of conversations as a template of transformers."""

import json

import numpy as np

from engine.chat_layout import ChatLayout, document_start
from engine.tokenizer import Tokenizer


def chat_template(layout: ChatLayout, tokenizer: Tokenizer) -> str | None:
    """A Jinja template that writes messages in a layout.

    transformers encodes what the template writes as one text. None where that gives other tokens
    than encode_prompt, as the text beside a marker can change those of the marker.
    """
    markers = layout.to_dict()
    if not all(is_token(marker, tokenizer) for marker in markers.values()):
        return None

    quote = json.dumps                      # Jinja reads strings as JSON writes them
    roles = ', '.join(f'{quote(role)}: {quote(markers[role])}'
                      for role in ('system', 'user', 'assistant'))
    return (f'{{%- set markers = {{{roles}}} -%}}'
            f'{{{{- {quote(text_before(tokenizer))} -}}}}'
            '{%- for message in messages -%}'
            f"{{{{- markers[message['role']] + message['content'] + {quote(layout.end)} -}}}}"
            '{%- endfor -%}'
            '{%- if add_generation_prompt -%}{{- markers["assistant"] -}}{%- endif -%}')


def is_token(marker, tokenizer):
    """True where the text around a marker cannot change its tokens."""
    if tokenizer.chars is not None:
        return set(marker) <= set(tokenizer.chars)
    alone = tokenizer.encode_to_numpy(marker)
    within = tokenizer.encode_to_numpy(f'?{marker}?')
    mark = tokenizer.encode_to_numpy('?')
    return len(alone) == 1 and np.array_equal(within, [*mark, *alone, *mark])


def text_before(tokenizer):
    """What encode_prompt puts before a conversation, as the text that spells these tokens."""
    ids = document_start(tokenizer)
    if tokenizer.end_of_text is not None:
        ids = [tokenizer.end_of_text, *ids]
    if tokenizer.chars is not None:
        return ''.join(tokenizer.chars[i] for i in ids)
    return tokenizer.decode(ids)
