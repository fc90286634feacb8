//! A step of AdamW on the adapter of a 7B model, by the bits of its moments and the place of its state: on the device,
//! managed and travelling from the host, and pinned on the host where the kernel reaches over PCIe.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::managed::{Placement, pages_on_demand};
use halfbyte::backend::cuda::optimizer::{Optimizer, Step, WINDOW};
use halfbyte::backend::{NewOptimizer, OptimKind, ParamGroup};
use libtest_mimic::Trial;

use super::{Bench, Row, bench};

/// The trainable weights of r=16 on the seven projections of Mistral-7B, as 448 tensors of about one size.
const P: usize = 41_943_040;
const TENSORS: usize = 448;

pub fn trials() -> Vec<Trial> {
    vec![bench("adamw", |b| {
        for (bits, kind) in [(32, OptimKind::PagedAdamw32bit), (8, OptimKind::PagedAdamw8bit)] {
            for (place, placement) in
                [("device", Placement::Device), ("host", Placement::Host), ("pinned", Placement::Pinned)]
            {
                if placement == Placement::Pinned || pages_on_demand(&b.cuda)? {
                    run(b, bits, kind, place, placement)?;
                }
            }
        }
        Ok(())
    })]
}

fn run(b: &mut Bench, bits: usize, kind: OptimKind, place: &str, placement: Placement) -> Result<(), Error> {
    let tensors = vec![P / TENSORS; TENSORS];
    let p = tensors.iter().sum();
    let init = vec![0.01; p];
    let mut state =
        Optimizer::placed(&b.cuda, NewOptimizer { kind, init: &init, tensors: &tensors }, placement, WINDOW)?;
    let (grads, norm) = (b.floats(p, 1e-3)?, b.cuda.upload(&[1.0f32])?);
    let mut lora = b.cuda.zeros::<bf16>(p)?;
    let groups = [ParamGroup { range: 0..p, lr: 1e-4, weight_decay: 0.0 }];
    // Read: gradient, master, m, v. Written: master, m, v, working copy. The absmax of 8-bit blocks is 1/32 byte a weight.
    let moments = 2 * bits / 8 * p;
    let bytes = 4 * p + 2 * (4 * p + moments) + 2 * p;
    let (op, shape) = (format!("adamw_{bits}bit"), format!("{p} in {TENSORS} tensors"));
    let mut step = 0;
    b.row(Row { op: &op, shape: &shape, implementation: place, bytes, flops: 0.0 }, |cuda, _| {
        step += 1;
        state.prefetch(cuda)?;
        let (beta1, beta2, eps, max_grad_norm) = (0.9, 0.999, 1e-8, 0.3);
        let (lora, grads, norm) = (lora.view_mut(), grads.view(), norm.view());
        state.adamw(cuda, Step { lora, grads, norm, groups: &groups, beta1, beta2, eps, max_grad_norm, step })
    })
}
