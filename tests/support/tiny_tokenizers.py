"""Small tokenizers of every kind that a user's model may have, and chat templates."""

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "A film was good. The film was bad, and nobody laughed at unbelievable things.",
    "user assistant system hello there, how are you today? I am fine. you are a helper",
    "\u4eca\u5929\u4e0b\u96e8\u3002\u6211\u5728\u5bb6\uff01 yes no 0 1 2 3 4 5 6 7 8 9",
    "a b c d e f g h i: j\n\nk\nl < > think /",
] * 3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] "
    "+ ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == "
    "'assistant' else m['role'] %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}"
    "{% endif %}"
)
# Writes an empty thought before the last answer, as Qwen3's does
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' "
    "and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Its header of an answer that is to be written is not the header of a written one
OPEN_THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<U>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<A>' + m['content'].split('</think>')[-1] + eos_token "
    "}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"
)
WITHOUT_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}{{ '<' + m['role'] + '>' + m['content'] + "
    "'</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MARKS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<U>", "<A>",
)  # fmt: skip


def fast(tokenizer, template=None, **names):
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = template
    return made


def around(tokenizer, lead, trail):
    """Lets a tokenizer write BOS before a text, EOS behind it, or both."""
    parts = [lead, "$A", trail]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in parts if part),
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in (lead, trail) if t],
    )


def byte_level(template=None, lead=None, trail=None, eos="</s>", size=420):
    """GPT-2's kind: a token carries the space before it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    if lead or trail:
        around(made, lead, trail)
    return fast(
        made, template, bos_token="<s>", eos_token=eos, pad_token="<pad>", mask_token="<mask>"
    )


def sentence_piece(template=None, lead="<s>", trail=None, split=True):
    """SentencePiece's kind: a space is written before a text; `split`: words first."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    if not split:  # as Llama's: the whole text is one word
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    if lead or trail:
        around(made, lead, trail)
    return fast(
        made, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        mask_token="<mask>",
    )  # fmt: skip


def word_piece():
    """BERT's kind."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    around(made, "[CLS]", "[SEP]")
    return fast(
        made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def whitespace(words=(), lead=None, trail=None):
    """A token a word, spaces are lost."""
    names = ["<unk>", "<s>", "</s>", *words]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lead or trail:
        around(made, lead, trail)
    return fast(made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
