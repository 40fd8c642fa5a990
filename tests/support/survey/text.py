"""Language models, text encoders, and models of an encoder and a decoder."""

from __future__ import annotations

import transformers as hf

from support.survey.surveyed import GROUPED, PAIR, TEXT, TOWER, Surveyed, long, seq2seq, tokens, uncached

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SIDES = {
    "encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **TEXT, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {"num_layers": 1, "num_heads": 4, "d_model": 32, "d_kv": 8, "d_ff": 48, **TEXT, "decoder_start_token_id": 0}
_SMALL = {"n_layer": 1, "n_head": 4, "n_embd": 32, **TEXT, "n_positions": 64}

TEXTS = [
    Surveyed("Mixtral", lambda: hf.MixtralModel(hf.MixtralConfig(**GROUPED, num_local_experts=4)), uncached),
    Surveyed("Qwen2-MoE", lambda: hf.Qwen2MoeModel(hf.Qwen2MoeConfig(
        **GROUPED, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=24)), uncached),
    Surveyed("Qwen3-MoE", lambda: hf.Qwen3MoeModel(hf.Qwen3MoeConfig(
        **GROUPED, **_EXPERTS, num_experts=4, head_dim=8)), uncached),
    Surveyed("OLMo 2", lambda: hf.Olmo2Model(hf.Olmo2Config(**GROUPED)), uncached),
    Surveyed("Cohere", lambda: hf.CohereModel(hf.CohereConfig(**GROUPED)), uncached),
    Surveyed("Phi-3", lambda: hf.Phi3Model(hf.Phi3Config(**GROUPED)), uncached),
    Surveyed("Gemma 3", lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(
        **PAIR, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"])), uncached),
    Surveyed("Llama 4", lambda: hf.Llama4TextModel(hf.Llama4TextConfig(
        **PAIR, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=5)), uncached),
    Surveyed("DiffLlama", lambda: hf.DiffLlamaModel(hf.DiffLlamaConfig(**GROUPED)), uncached),
    Surveyed("Granite", lambda: hf.GraniteModel(hf.GraniteConfig(**GROUPED)), uncached),
    Surveyed("StarCoder 2", lambda: hf.Starcoder2Model(hf.Starcoder2Config(**GROUPED)), uncached),
    Surveyed("GPT-J", lambda: hf.GPTJModel(hf.GPTJConfig(**_SMALL, rotary_dim=4)), uncached),
    Surveyed("GPT-BigCode", lambda: hf.GPTBigCodeModel(hf.GPTBigCodeConfig(**_SMALL)), uncached),
    Surveyed("OPT", lambda: hf.OPTModel(hf.OPTConfig(
        **TEXT, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64)), uncached),
    Surveyed("ALBERT", lambda: hf.AlbertModel(hf.AlbertConfig(
        **{**TOWER, "num_hidden_layers": 2}, vocab_size=60, embedding_size=24)), tokens),
    Surveyed("ELECTRA", lambda: hf.ElectraModel(hf.ElectraConfig(**TOWER, vocab_size=60, embedding_size=24)), tokens),
    Surveyed("ConvBERT", lambda: hf.ConvBertModel(hf.ConvBertConfig(
        **TOWER, vocab_size=60, embedding_size=24, conv_kernel_size=3, head_ratio=2)), tokens),
    Surveyed("MPNet", lambda: hf.MPNetModel(hf.MPNetConfig(**TOWER, vocab_size=60)), tokens),
    Surveyed("XLNet", lambda: hf.XLNetModel(hf.XLNetConfig(
        vocab_size=60, d_model=32, n_layer=2, n_head=4, d_inner=48)), tokens),
    Surveyed("Funnel", lambda: hf.FunnelModel(hf.FunnelConfig(
        vocab_size=60, block_sizes=[1, 1], num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=48)),
        tokens, (17, 9)),
    Surveyed("Nyströmformer", lambda: hf.NystromformerModel(hf.NystromformerConfig(
        **TOWER, vocab_size=60, segment_means_seq_len=18, num_landmarks=3, conv_kernel_size=3)), long(18), (18,)),
    Surveyed("FNet", lambda: hf.FNetModel(hf.FNetConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, vocab_size=60)), tokens),
    Surveyed("BigBird", lambda: hf.BigBirdModel(hf.BigBirdConfig(
        **TOWER, vocab_size=60, block_size=6, num_random_blocks=1, max_position_embeddings=128)), long(66), (66,)),
    Surveyed("Longformer", lambda: hf.LongformerModel(hf.LongformerConfig(
        **TOWER, vocab_size=60, attention_window=6)), long(18), (18,)),
    Surveyed("Reformer", lambda: hf.ReformerModel(hf.ReformerConfig(
        vocab_size=60, hidden_size=32, feed_forward_size=48, num_attention_heads=4, attention_head_size=8,
        attn_layers=["local", "lsh"], axial_pos_embds=False, max_position_embeddings=64, local_attn_chunk_length=6,
        lsh_attn_chunk_length=6, num_buckets=2, num_hashes=1, hash_seed=0)),
        lambda: {**long(18)(), "use_cache": False}, (18,)),
    Surveyed("LongT5", lambda: hf.LongT5Model(hf.LongT5Config(
        **_T5, local_radius=5, encoder_attention_type="local")), seq2seq(), (17, 9)),
    Surveyed("LongT5, global", lambda: hf.LongT5Model(hf.LongT5Config(
        **_T5, local_radius=5, global_block_size=5, encoder_attention_type="transient-global")), seq2seq(), (17, 9)),
    Surveyed("Pegasus-X", lambda: hf.PegasusXModel(hf.PegasusXConfig(
        **_SIDES, block_size=6, num_global_tokens=3, max_position_embeddings=64)), seq2seq(18), (18, 9)),
    Surveyed("Switch", lambda: hf.SwitchTransformersModel(hf.SwitchTransformersConfig(
        **_T5, num_decoder_layers=1, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=3,
        expert_capacity=6)), seq2seq(), (17, 9)),
    Surveyed("Marian", lambda: hf.MarianModel(hf.MarianConfig(**_SIDES)), seq2seq(), (17, 9)),
    Surveyed("M2M-100", lambda: hf.M2M100Model(hf.M2M100Config(**_SIDES)), seq2seq(), (17, 9)),
]  # fmt: skip
