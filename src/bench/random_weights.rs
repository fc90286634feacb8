//! Random weights of a model's shapes, made as fast as memory can be filled: only speed and memory matter here.

use half::bf16;

use crate::checkpoint::random::repeated;
use crate::error::{Error, Result};
use crate::model::shapes::{projection_dims, vector_len};
use crate::model::{ModelConfig, WeightSource};
use crate::nf4::{Absmax, BLOCK, NESTED_BLOCK, QuantType, Quantized};
use crate::rng::{Stream, word};
use crate::tensor::{Dtype, HostMatrix, HostTensor};

/// Elements of the random run that every tensor repeats, each from another place.
const RUN: usize = 1 << 20;

/// Projections in NF4 with double quantisation, values of deviation about 0.02; embedding and head in bf16; norms of one.
pub struct RandomWeights {
    config: ModelConfig,
    bytes: Vec<u8>,
    bf16: Vec<u8>,
    /// Where the next tensor starts in the run.
    start: usize,
}

impl RandomWeights {
    pub fn new(config: &ModelConfig) -> Self {
        let bytes: Vec<u8> = (0..RUN as u64 / 4).flat_map(|i| word(1, Stream::Init, 0, i).to_le_bytes()).collect();
        // Uniform in ±0.035: deviation 0.02.
        let value = |&b: &u8| bf16::from_f32((f32::from(b) - 127.5) * (0.035 / 127.5)).to_le_bytes();
        let bf16 = bytes.iter().flat_map(value).collect();
        Self { config: config.clone(), bytes, bf16, start: 0 }
    }

    fn quantized(&mut self, n: usize, k: usize) -> Quantized {
        let blocks = (n * k).div_ceil(BLOCK);
        self.start += 7919;
        let packed = repeated(&self.bytes, self.start, (n * k).div_ceil(2));
        let codes = repeated(&self.bytes, self.start + 4099, blocks);
        // absmax = 0.04 ± 0.02
        let absmax = Absmax::Double { codes, nested_absmax: vec![0.02; blocks.div_ceil(NESTED_BLOCK)], offset: 0.04 };
        Quantized { quant_type: QuantType::Nf4, shape: vec![n, k], source_dtype: Dtype::Bf16, packed, absmax }
    }
}

impl WeightSource for RandomWeights {
    fn vector(&mut self, name: &str) -> Result<HostTensor> {
        let unknown = || Error::input("random weights", name, "no such vector", "a norm or a bias");
        let n = vector_len(&self.config, name).ok_or_else(unknown)?;
        // Norms of one, biases of zero.
        let value = if projection_dims(&self.config, name).is_some() { 0.0 } else { 1.0 };
        Ok(HostTensor::from_f32(vec![n], &vec![value; n]))
    }

    fn matrix(&mut self, name: &str) -> Result<HostMatrix> {
        if let Some((n, k)) = projection_dims(&self.config, name) {
            return Ok(HostMatrix::Quantized(self.quantized(n, k)));
        }
        let (v, c) = (self.config.vocab_size, self.config.hidden_size);
        self.start += 7920;
        let bytes = repeated(&self.bf16, self.start & !1, 2 * v * c);
        Ok(HostMatrix::Dense(HostTensor::owned(Dtype::Bf16, vec![v, c], bytes)))
    }
}
