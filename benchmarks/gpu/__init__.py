"""What is measured on a card, and how: `bash benchmarks/gpu_session.sh` runs all of it.

`session` runs the steps, each a process with a time limit: `build`, `suite` (the GPU tests),
`parity`, `sanitizer`, `timings`, `profiles`. A step writes what it finds as it goes (`report`), and
leaves work that may hang or break a CUDA context to further processes (`pool`, `worker`), which run
`compare` and `race`. `bounds` is the arithmetic. Nothing but those two, `bounds` and `profiles`
imports torch, and nothing what a bare machine may lack.
"""
