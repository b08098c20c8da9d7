"""The chat template of a run that was trained on examples."""

from train.config.config import Config
from train.data.chat import Chat
from train.data.chat_template_files import open_chat_template
from train.data.chat_tokens import ChatEncoder
from train.data.tokenizer import Tokenizer
from train.host.paths import AnyPath
from train.run.stored import stored_tokenizer


def own_chat(
    folder: AnyPath, config: Config, tokenizer: Tokenizer | None
) -> Chat | None:
    """Writes and encodes prompts as a run's examples were; None if it had texts.

    Raises:
      FileNotFoundError: its chat_template.jinja is not in its folder.
    """
    path = stored_tokenizer(folder)
    if config.data.windows != "examples" or tokenizer is None or path is None:
        return None
    encoder = ChatEncoder(tokenizer)
    return Chat(open_chat_template(None, path, encoder.begin, encoder.end), encoder)
