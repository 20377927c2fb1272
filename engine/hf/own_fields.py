"""What an exported folder says to our own scripts alone, as transformers has no place for it.

It is a field of tokenizer_config.json, which transformers takes no notice of.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from engine.chat_layout import ChatLayout
from engine.errors import UserError
from engine.tokenizer import CHAR_END, TokenizerSpec

CONFIG = 'tokenizer_config.json'
FIELD = 'plaingpt'
MAX_BYTES = 1 << 26             # of that file


class OwnFields(NamedTuple):
    """special_tokens: as TokenizerSpec has it. end_of_text: the id after each document, with
    characters. chat: the layout of the conversations that the model was trained on, or None."""
    special_tokens: bool | None = None
    end_of_text: int | None = None
    chat: ChatLayout | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of the field: what is not None."""
        found = {name: value for name, value in self._asdict().items() if value is not None}
        if self.chat:
            found['chat'] = self.chat.to_dict()
        return found

    def complete(self, spec: TokenizerSpec) -> TokenizerSpec:
        """The spec of the folder's tokenizer with these fields."""
        fields = spec.to_dict() | {'special_tokens': self.special_tokens}
        end = self.end_of_text
        if spec.chars and end is not None and spec.chars[end:end + 1] == CHAR_END:
            fields['end_of_text'] = end
        return TokenizerSpec.from_dict(fields)


def own_fields(spec: TokenizerSpec, chat: ChatLayout | None) -> OwnFields:
    """The OwnFields of a model with this tokenizer and this layout of conversations."""
    end = None
    if spec.chars is not None:
        end = spec.end_of_text
    return OwnFields(spec.special_tokens, end, chat)


def read_own_fields(folder: Path) -> OwnFields:
    """The OwnFields of an exported folder; all are None in a folder of others.

    Raises UserError where the field is not as we write it.
    """
    path = folder / CONFIG
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return OwnFields()
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError):
        return OwnFields()                  # whoever reads the tokenizer says so
    if not isinstance(config, dict) or FIELD not in config:
        return OwnFields()

    found = config[FIELD]
    if not isinstance(found, dict) or not found.keys() <= set(OwnFields._fields):
        raise UserError(f'{path}: its {FIELD} should have only {", ".join(OwnFields._fields)}')
    types = dict(special_tokens=bool, end_of_text=int, chat=dict)
    for name, value in found.items():
        if type(value) is not types[name]:
            raise UserError(f'{path}: the {name} of its {FIELD} is a {type(value).__name__}')
    if found.get('end_of_text', 0) < 0:
        raise UserError(f'{path}: the end_of_text of its {FIELD} is below 0')
    if 'chat' in found:
        try:
            found['chat'] = ChatLayout.from_dict(found['chat'])
        except UserError as error:
            raise UserError(f'{path}: {error}') from None
    return OwnFields(**found)
