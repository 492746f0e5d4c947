"""The bundled trainer: GPTs trained over data, tensor and expert parallel ranks that communicate through pycomm alone.

Read it in this order: `config` and `model_config` (what a run is), `mesh` (who talks to whom), `sharding` and
`parallel` (how a layer is cut), `model` and `moe`, `data`, `optimizer`, then `trainer`, one step of which uses all.
"""
