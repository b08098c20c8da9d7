"""Parameter trees of published models: names, small shapes, and what each leaf is.

A line has a path, the shape, and what is right: "full"; the axes of "batch | rows |
columns"; or "?", where names and shapes do not say. The sizes are small; D is 64, the
vocabulary 300.
"""

TREES = {
    "this library's LLaMA": """
        embed/embedding                 300,64      full
        head/kernel                     64,300      full
        layers/attention/q/kernel       3,64,64     0|1|2
        layers/attention/o/kernel       3,64,64     0|1|2
        layers/mlp/gate/kernel          3,64,176    0|1|2
        layers/mlp/up/kernel            3,64,176    0|1|2
        layers/mlp/down/kernel          3,176,64    0|1|2
        layers/attention_norm/scale     3,64        full
        norm/scale                      64          full
    """,
    "Hugging Face LLaMA": """
        model/embed_tokens/embedding                300,64   full
        model/layers/0/self_attn/q_proj/kernel      64,64    |0|1
        model/layers/0/mlp/gate_proj/kernel         64,176   |0|1
        model/layers/0/mlp/down_proj/kernel         176,64   |0|1
        model/layers/0/input_layernorm/weight       64       full
        lm_head/kernel                              64,300   full
    """,
    "LLaMA as released": """
        tok_embeddings/weight                300,64   full
        layers/0/attention/wq/weight         64,64    |0|1
        layers/0/feed_forward/w1/weight      176,64   |0|1
        layers/0/attention_norm/weight       64       full
        norm/weight                          64       full
        output/weight                        300,64   full
    """,
    "GPT-2": """
        wte/embedding                   300,64   full
        wpe/embedding                   32,64    full
        h/0/attn/c_attn/kernel          64,192   |0|1
        h/0/attn/c_attn/bias            192      full
        h/0/mlp/c_fc/kernel             64,256   |0|1
        h/0/ln_1/scale                  64       full
    """,
    "GPT-NeoX": """
        embed_in/embedding                           300,64   full
        layers/0/attention/query_key_value/kernel    64,192   |0|1
        layers/0/mlp/dense_h_to_4h/kernel            64,256   |0|1
        embed_out/kernel                             64,300   full
    """,
    "BERT": """
        embeddings/word_embeddings/embedding           300,64   full
        embeddings/LayerNorm/scale                     64       full
        encoder/layer/0/attention/self/query/kernel    64,64    |0|1
        encoder/layer/0/attention/output/dense/kernel  64,64    |0|1
        encoder/layer/0/intermediate/dense/kernel      64,256   |0|1
        encoder/layer/0/output/dense/kernel            256,64   |0|1
        pooler/dense/kernel                            64,64    ?
        cls/predictions/decoder/kernel                 64,300   full
    """,
    "T5": """
        shared/embedding                                              300,64  full
        encoder/block/0/layer/0/SelfAttention/q/kernel                64,64   |0|1
        block/0/layer/0/SelfAttention/relative_attention_bias/embedding 32,4 full
        encoder/block/0/layer/1/DenseReluDense/wi/kernel              64,176  |0|1
        encoder/relpos_bias/rel_embedding                             4,32    full
    """,
    "Mixtral": """
        model/layers/0/block_sparse_moe/gate/kernel            64,8     full
        model/layers/0/block_sparse_moe/experts/0/w1/kernel    64,176   |0|1
    """,
    "Qwen-MoE": """
        model/layers/0/mlp/gate/kernel                     64,60      full
        model/layers/0/mlp/shared_expert_gate/kernel       64,1       full
        model/layers/0/mlp/shared_expert/up_proj/kernel    64,176     |0|1
        model/layers/0/mlp/experts/up_proj                 8,64,176   0|1|2
    """,
    "DeepSeek": """
        model/layers/0/self_attn/q_a_proj/kernel               64,24   |0|1
        model/layers/0/self_attn/q_a_layernorm/weight          24      full
        model/layers/1/mlp/gate/weight                         8,64    full
        model/layers/1/mlp/shared_experts/gate_proj/kernel     64,96   |0|1
        model/layers/1/mlp/experts/0/gate_proj/kernel          64,32   |0|1
    """,
    "stacked layers of stacked experts": """
        layers/attn_norm/scale          3,64         full
        layers/moe/router/kernel        3,64,8       full
        layers/moe/experts/w1           3,8,64,176   0,1|2|3
        layers/moe/experts/b1           3,8,176      full
        layers/moe/shared/up/kernel     3,64,176     0|1|2
    """,
    "Flax attention": """
        attn/query/kernel    64,4,16   |0|1,2
        attn/query/bias      4,16      full
        attn/out/kernel      4,16,64   |0,1|2
        attn/out/bias        64        full
    """,
    "Flax attention without biases": """
        embed/embedding                             300,64    full
        blocks_0/CausalAttn_0/query/kernel          64,4,16   |0|1,2
        blocks_0/CausalAttn_0/attn_out_proj/kernel  4,16,64   |0,1|2
        blocks_0/Mlp_0/Dense_0/kernel               64,256    |0|1
        blocks_0/LayerNorm_0/scale                  64        full
    """,
    "Flax attention under a scan": """
        ScanBlock_0/MultiHeadDotProductAttention_0/query/kernel   3,64,4,16   0|1|2,3
        ScanBlock_0/MultiHeadDotProductAttention_0/query/bias     3,4,16      full
        ScanBlock_0/MultiHeadDotProductAttention_0/out/kernel     3,4,16,64   0|1,2|3
        ScanBlock_0/MultiHeadDotProductAttention_0/out/bias       3,64        full
    """,
    "big_vision's ViT": """
        embedding/kernel        4,4,3,64    |0,1,2|3
        pos_embedding           1,16,64     full
        cls                     1,1,64      full
        encoderblock/MultiHeadDotProductAttention_0/query/kernel 3,64,4,16 0|1|2,3
        encoderblock/MlpBlock_0/Dense_0/kernel        3,64,176   0|1|2
        encoderblock/MlpBlock_0/Dense_0/bias          3,176      full
        encoderblock/LayerNorm_0/scale                3,64       full
        head/kernel             64,10       full
    """,
    "Hugging Face ViT": """
        vit/embeddings/cls_token                                 1,1,64     full
        vit/embeddings/position_embeddings                       1,17,64    full
        vit/embeddings/patch_embeddings/projection/kernel        4,4,3,64   |0,1,2|3
        vit/encoder/layer/0/attention/attention/query/kernel     64,64      |0|1
        classifier/kernel                                        64,10      full
    """,
    "MaxText, layers on the second axis": """
        token_embedder/embedding                               300,64      full
        decoder/layers/self_attention/query/kernel             64,3,4,16   1|0|2,3
        decoder/layers/self_attention/out/kernel               4,3,16,64   1|0,2|3
        decoder/layers/mlp/wi_0/kernel                         64,3,176    1|0|2
        decoder/layers/mlp/wo/kernel                           176,3,64    1|0|2
        decoder/layers/pre_self_attention_layer_norm/scale     64,3        full
        decoder/decoder_norm/scale                             64          full
        decoder/logits_dense/kernel                            64,300      full
    """,
    "MaxText, experts": """
        token_embedder/embedding                    300,64       full
        decoder/layers/MoeBlock_0/gate/kernel       64,3,8       full
        decoder/layers/MoeBlock_0/wi_0              8,3,64,176   0,1|2|3
        decoder/layers/pre_norm/scale               64,3         full
    """,
    "Gemma": """
        embedder/input_embedding             300,64      full
        layer_0/attn/q_einsum/w              4,64,16     |1|0,2
        layer_0/attn/kv_einsum/w             2,1,64,16   0|2|1,3
        layer_0/attn/attn_vec_einsum/w       4,16,64     |0,1|2
        layer_0/mlp/gating_einsum            2,64,176    0|1|2
        layer_0/mlp/linear                   176,64      |0|1
        layer_0/pre_attention_norm/scale     64          full
    """,
    "Equinox": """
        layers/0/weight                  176,64   |0|1
        layers/0/bias                    176      full
        attention/query_proj/weight      64,64    |0|1
    """,
    "Equinox, stacked by filter_vmap": """
        embed/weight                       300,64     full
        layers/attn/query_proj/weight      3,64,64    0|1|2
        layers/mlp/layers/0/weight         3,176,64   0|1|2
        layers/mlp/layers/0/bias           3,176      full
        layers/norm1/weight                3,64       full
    """,
    "Haiku": """
        transformer/h0_attn/query/w      64,64    |0|1
        transformer/h0_mlp/linear/w      64,256   |0|1
        transformer/h0_ln_1/scale        64       full
        embed/embeddings                 300,64   full
    """,
    "adapters": """
        layers/0/attn/q/kernel                    64,64   |0|1
        layers/0/attn/q/lora_a                    64,4    full
        layers/0/attn/q/lora_b                    4,64    full
        layers/0/attn/v/lora_A/kernel             64,4    full
        layers/0/attn/adapter/down/kernel         64,8    full
        prompt_embeddings                         20,64   full
    """,
    "state space": """
        layers/0/mixer/in_proj/kernel      64,128    |0|1
        layers/0/mixer/A_log               128,16    full
        layers/0/mixer/conv1d/kernel       4,1,128   full
    """,
    "Swin": """
        layers/0/blocks/0/attn/relative_position_bias_table    169,4    full
        layers/0/blocks/0/attn/qkv/kernel                      64,192   |0|1
    """,
    "vectors that are stacked": """
        layers/attn/q_norm/scale      3,16       full
        layers/attn/q/bias            3,64       full
        layers/attn/q/kernel          3,64,64    0|1|2
        layers/attn/sinks             3,4        full
        layers/mlp/b_up               3,176      full
        layers/attn/pos_bias          16,16      full
    """,
    "routers by other names": """
        block/1/layer/1/mlp/router/classifier/kernel      64,8     full
        blocks/0/ffn/router/layer/weight                  64,8     full
        layers/0/mlp/deepspeed_moe/gate/wg/weight         8,64     full
        layers/1/moe/gate_w                               64,8     full
        layers/2/moe/gating/kernel                        64,8     full
        layers/3/moe/shared/gate/kernel                   64,176   |0|1
        layers/3/moe/shared/up/kernel                     64,176   |0|1
        layers/4/attn/gate/kernel                         64,64    |0|1
    """,
    "heads among the layers": """
        embed/embedding                              300,64   full
        model/mlp_head/kernel                        64,10    full
        model/layers/61/shared_head/head/weight      300,64   full
        medusa_heads/0/1/weight                      300,64   full
        exits/layers/0/lm_head/kernel                64,300   full
        attention/head_0/q/kernel                    64,16    |0|1
    """,
    "a sequence with numbers for names": """
        layers/0/embedding     300,64    full
        layers/1/kernel        64,64     |0|1
        layers/2/kernel        64,300    full
    """,
    "attention of layers with experts": """
        embed/embedding                    300,64      full
        moe_layers/attn/query/kernel       3,64,4,16   0|1|2,3
        moe_layers/attn/value/kernel       3,64,4,16   0|1|2,3
        moe_layers/attn/out/kernel         3,4,16,64   0|1,2|3
        moe_layers/ln/scale                3,64        full
    """,
    "experts by their router alone": """
        layers/attn_norm/scale     4,64         full
        layers/mlp/w_gate          4,8,64,176   0,1|2|3
        layers/mlp/w_down          4,8,176,64   0,1|2|3
        layers/mlp/router          4,64,8       full
    """,
    "a vector that the layers share": """
        embed/embedding             300,64    full
        layers/attn/q/kernel        4,64,64   ?
        layers/mlp/up/kernel        4,64,96   ?
        layers/ln/scale             4,64      full
        layers/shared_ln/scale      64        full
    """,
    "as many heads as a head is wide": """
        blocks_0/MultiHeadDotProductAttention_0/query/kernel   64,8,8   |0|1,2
        blocks_0/MultiHeadDotProductAttention_0/value/kernel   64,8,8   |0|1,2
        blocks_0/MultiHeadDotProductAttention_0/out/kernel     8,8,64   |0,1|2
    """,
    "vectors of attention": """
        attention/gating_w                    64,64    |0|1
        attention/gating_b                    4,16     full
        attn/null_kv                          2,64     full
        attn/mem_k                            4,16,16  full
        layers/0/attn/bq                      4,16     full
        mlp/memory_values                     1024,64  full
        b/0/recurrent_block/conv_1d/w         4,64     full
    """,
    "convolutions": """
        layers/0/mixer/conv1d/weight          160,1,4    full
        stages_0/0/dwconv/kernel              7,7,1,32   full
        conv_in/kernel                        3,3,4,32   |0,1,2|3
        attentions_0/proj_in/kernel           1,1,32,32  |0,1,2|3
    """,
    "low-rank adapters of other kinds": """
        layers/0/attn/q_proj/lokr_w1          4,4      full
        layers/0/attn/q_proj/hada_w1_a        64,4     full
        attn/lora/base_module/kernel          64,64    |0|1
        attn/lora/lora_a                      64,4     full
        ssm/B                                 64,16    ?
    """,
    "names without a word": """
        emb/~/w          300,64    full
        layers/0/mlp/β   8,12      ?
    """,
    "a plain MLP": """
        Dense_0/kernel      784,512   ?
        Dense_0/bias        512       full
        Dense_1/kernel      512,10    ?
    """,
}


def parsed(tree: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """From path to shape and what is right."""
    rows = (line.split() for line in tree.strip().splitlines())
    return {
        path: (tuple(map(int, shape.split(","))), want) for path, shape, want in rows
    }
