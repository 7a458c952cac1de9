import pytest

from lit_sparse.data import ByteTokenizer, HFTokenizer
from lit_sparse.data.tasks.symbols import WORDS


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """By name: bytes, and a byte-level BPE that joins digits and knows half of the words whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = WORDS.split()[::2]
    text = [f"# {word}: {i}{i + 7} = {3 * i}, {word}" for i, word in enumerate(words)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text * 3,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="</s>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    loaded = HFTokenizer(folder)
    assert len(loaded.encode("12")) == 1
    return {"bytes": ByteTokenizer(), "bpe": loaded}
