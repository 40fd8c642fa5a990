"""Text encoders, and models of an encoder and a decoder."""

from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import nn

from support.zoo.family import (
    ENCODER_DECODER,
    EVERY_BACKEND,
    ONE_TOWER,
    SPECIAL,
    VOCABULARY,
    Family,
    ids,
    padded,
    padded_inputs,
)

_BERT = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 32,
    "vocab_size": VOCABULARY,
}  # fmt: skip
_SIDES = {
    "encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": VOCABULARY, **SPECIAL,
}  # fmt: skip


def _bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**_BERT))


def _roberta() -> nn.Module:
    return hf.RobertaModel(hf.RobertaConfig(**_BERT, max_position_embeddings=40, **SPECIAL))


def _deberta() -> nn.Module:
    return hf.DebertaV2Model(
        hf.DebertaV2Config(
            **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=True,
            max_relative_positions=12, norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
        )
    )  # fmt: skip


def _modernbert() -> nn.Module:
    return hf.ModernBertModel(
        hf.ModernBertConfig(
            **_BERT, local_attention=6, global_attn_every_n_layers=2, max_position_embeddings=40, sep_token_id=2,
            cls_token_id=1, **SPECIAL,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            num_layers=2, num_heads=4, d_model=32, d_kv=8, d_ff=32, vocab_size=VOCABULARY, decoder_start_token_id=0,
        )
    )  # fmt: skip


def _bart() -> nn.Module:
    return hf.BartForConditionalGeneration(hf.BartConfig(**_SIDES, decoder_start_token_id=2))


def _whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**_SIDES, num_mel_bins=8, max_source_positions=20, decoder_start_token_id=3)
    )


def _seq2seq(side: str = "right") -> dict[str, Any]:
    tokens = ids(2, 17)
    return {"input_ids": tokens, "attention_mask": padded(tokens, side), "decoder_input_ids": ids(2, 9, seed=1)}


def _alone() -> dict[str, Any]:
    return {name: tensor[:1] for name, tensor in _seq2seq().items()}


def _speech() -> dict[str, Any]:
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": ids(2, 9)}


_RIGHT = partial(padded_inputs, "right")
ENCODERS = [
    Family("bert", _bert, _RIGHT, ONE_TOWER, label="BERT", backends=EVERY_BACKEND),
    Family("roberta", _roberta, _RIGHT, ONE_TOWER, label="RoBERTa", backends=EVERY_BACKEND),
    Family("modernbert", _modernbert, _RIGHT, ONE_TOWER, label="ModernBERT",
           note="windows to both sides in some layers", backends=EVERY_BACKEND),
    Family("deberta-v2", _deberta, _RIGHT, ONE_TOWER, label="DeBERTa-v2",
           note="content and position terms in one softmax; attention written out"),
    Family("t5", _t5, _seq2seq, ENCODER_DECODER, label="T5", note="position bias", backends=("sdpa", "eager")),
    # With flex transformers asks for a position bias per batch entry, and T5 has one for all.
    Family("t5-alone", _t5, _alone, ENCODER_DECODER, label="T5", backends=("flex_attention",)),
    # With a flash backend transformers takes the decoder's rows for padding where the encoder's last keys are.
    Family("bart", _bart, _seq2seq, ENCODER_DECODER, label="BART", backends=EVERY_BACKEND[:3]),
    Family("bart-left-padded", _bart, partial(_seq2seq, "left"), ENCODER_DECODER, label="BART",
           backends=EVERY_BACKEND[3:]),
    Family("whisper", _whisper, _speech, ENCODER_DECODER, label="Whisper", backends=EVERY_BACKEND),
]  # fmt: skip
