"""What single tokens stand for: their bytes, and a name that no two bytes share."""

from lm_jax.convert import tokenizer_json
from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.data.tokenizer import Tokenizer, continuation


class Spelling:
    """What single tokens stand for."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.lead = tokenizer, tokenizer.encode("a").tolist()  # behind it a token shows its space
        self.pieces = HuggingFace(tokenizer_json.of(tokenizer))
        self.special = {*self.pieces.special.values()}
        self.letters = {letter: byte for byte, letter in enumerate(tokenizer_json.letters())}

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; of one that stands for no text its name."""
        text, piece = continuation(self.tokenizer, self.lead, [token]), self.pieces.piece(token)
        if text and "\ufffd" not in text:
            return text.encode()
        if piece.startswith("<0x") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])
        is_text = token not in self.special and set(piece) <= set(self.letters)
        return bytes(self.letters[letter] for letter in piece) if is_text else piece.encode()

    def name(self, token: int) -> str:
        """A token as a string; half a character as OpenAI writes its bytes."""
        spelled = self.bytes_of(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
