//! The ways of the linear op on a GPU.

use std::sync::Arc;

use super::lora::Part;
use crate::backend::cuda::matrix::{Absmax, Data, Matrix};
use crate::backend::cuda::{Cuda, LinearKind};
use crate::backend::{Backend, Linear, LinearBackward, LinearForward, Lora, Projection};
use crate::bench::kernels::case::{Way, undeclared};
use crate::bench::kernels::models::R;
use crate::bench::kernels::set::{Dev, Set};
use crate::error::{Error, Result};
use crate::nf4::{BLOCK, NESTED_BLOCK, QuantType};

/// Name, kind, most tokens that it is timed with.
const KINDS: [(&str, LinearKind, usize); 4] = [
    ("matvec", LinearKind::Matvec, 16),
    ("fused", LinearKind::Fused, usize::MAX),
    ("slice", LinearKind::Slice, usize::MAX),
    ("slice_cublas", LinearKind::SliceCublas, usize::MAX),
];

type Launch = dyn Fn(&mut Cuda, &Linear<Cuda>, &mut [Dev]) -> Result<()> + Send + Sync;

fn ways(t: usize, k: usize, n: usize, parts: &[Part], weights_at: usize, launch: Arc<Launch>) -> Vec<Way> {
    let kinds = KINDS.into_iter().filter(|&(_, _, most)| t <= most);
    kinds
        .map(|(name, kind, _)| {
            let (parts, launch) = (parts.to_vec(), launch.clone());
            Way {
                needs_cublas: kind == LinearKind::SliceCublas,
                set_up: Some(Arc::new(move |cuda, set| {
                    set.extra = Some(Box::new(linear(cuda, &set.args[weights_at..], &parts, k, n)?));
                    Ok(())
                })),
                ..Way::new(name, move |cuda, Set { args, extra }| {
                    let w = extra.as_ref().and_then(|e| e.downcast_ref::<Linear<Cuda>>());
                    let missing = || Error::Cuda { op: "linear".into(), detail: "the set was not set up".into() };
                    cuda.use_linear(Some(kind));
                    launch(cuda, w.ok_or_else(missing)?, args)
                })
            }
        })
        .collect()
}

/// The parts as matrices of their own: copies of rows of `packed` and `codes`.
fn linear(cuda: &Cuda, weights: &[Dev], parts: &[Part], k: usize, n: usize) -> Result<Linear<Cuda>> {
    let mut projections = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let (start, len) = (part.y * k, part.n * k);
        let blocks = len / BLOCK;
        let mut packed = cuda.zeros::<u8>(len / 2)?;
        cuda.copy(packed.view_mut(), weights[0].u8().range(start / 2..(start + len) / 2))?;
        let mut codes = cuda.zeros::<u8>(blocks)?;
        cuda.copy(codes.view_mut(), weights[1].u8().range(start / BLOCK..(start + len) / BLOCK))?;
        let mut nested_absmax = cuda.zeros::<f32>(blocks.div_ceil(NESTED_BLOCK))?;
        // The same everywhere.
        cuda.copy(nested_absmax.view_mut(), weights[2].f32().range(0..blocks.div_ceil(NESTED_BLOCK)))?;
        let mut offset = cuda.zeros::<f32>(1)?;
        cuda.copy(offset.view_mut(), weights[3].f32())?;
        let data =
            Data::Nf4 { packed, absmax: Absmax::Double { codes, nested_absmax, offset }, quant_type: QuantType::Nf4 };
        let lora = Lora { a: part.a, b: part.b, r: R, scale: 1.0, site: i as u32 };
        projections.push(Projection { n: part.n, w: Matrix { n: part.n, k, data }, bias: None, lora: Some(lora) });
    }
    Ok(Linear { k, n, r: R * parts.len(), parts: projections })
}

pub(super) fn forward_ways(t: usize, k: usize, n: usize, parts: &[Part]) -> Vec<Way> {
    let launch = move |cuda: &mut Cuda, w: &Linear<Cuda>, args: &mut [Dev]| {
        let [Dev::Bf16(y), Dev::Bf16(h), Dev::Bf16(x), Dev::Bf16(lora), ..] = args else { undeclared() };
        cuda.linear_forward(LinearForward { y, h, x, w, lora: Some(lora), t, dropout: None })
    };
    ways(t, k, n, parts, 4, Arc::new(launch))
}

pub(super) fn backward_ways(t: usize, k: usize, n: usize, parts: &[Part]) -> Vec<Way> {
    let launch = move |cuda: &mut Cuda, w: &Linear<Cuda>, args: &mut [Dev]| {
        let [
            Dev::Bf16(dx),
            Dev::Bf16(dh),
            Dev::F32(d_lora),
            Dev::Bf16(dy),
            Dev::Bf16(x),
            Dev::Bf16(h),
            Dev::Bf16(lora),
            ..,
        ] = args
        else {
            undeclared();
        };
        let dx = Some(dx);
        cuda.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout: None })
    };
    let mut ways = ways(t, k, n, parts, 7, Arc::new(launch));
    // Its backward is the fused one.
    ways.retain(|way| way.name != "matvec");
    ways
}
