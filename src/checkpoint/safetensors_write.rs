//! Writing safetensors without holding a file in memory.
//!
//! The header comes first and names sizes that a stream does not know yet. So its room is reserved, the data is put
//! where it belongs, and the header is written last, padded with spaces as the format allows.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::safetensors_file::FileDtype;

/// The size of a shard in bytes, as transformers has it by default.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub name: String,
    pub dtype: FileDtype,
    pub shape: Vec<usize>,
}

impl Spec {
    pub fn new(name: impl Into<String>, dtype: FileDtype, shape: Vec<usize>) -> Self {
        Self { name: name.into(), dtype, shape }
    }

    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// The JSON header of tensors that lie one behind the other, with the mark of a PyTorch file.
fn header(specs: &[(Spec, u64)]) -> String {
    let mut text = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    for (s, begin) in specs {
        // A string of any content serialises.
        let name = serde_json::to_string(&s.name).unwrap_or_default();
        let (dtype, shape, end) = (s.dtype, &s.shape, begin + s.bytes());
        text += &format!(r#",{name}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#);
    }
    text.push('}');
    text
}

/// Pads a header to `room` bytes, at least its own and a multiple of 8, and puts its length in front.
fn framed(mut text: String, room: usize) -> Vec<u8> {
    let room = room.max(text.len()).next_multiple_of(8);
    text.extend(std::iter::repeat_n(' ', room - text.len()));
    let mut bytes = (room as u64).to_le_bytes().to_vec();
    bytes.extend(text.into_bytes());
    bytes
}

/// Places tensors one behind the other. Wider dtypes must come first, so that each lies aligned for its readers.
fn place(specs: Vec<Spec>) -> (Vec<(Spec, u64)>, u64) {
    let mut end = 0;
    let placed = specs
        .into_iter()
        .map(|s| {
            let begin = end;
            assert!(begin % (s.dtype.bitsize() as u64 / 8).max(1) == 0, "{} would lie unaligned", s.name);
            end += s.bytes();
            (s, begin)
        })
        .collect();
    (placed, end)
}

/// Writes tensors whose bytes are at hand, in order.
pub fn write_to(out: &mut dyn Write, tensors: Vec<(Spec, &[u8])>) -> io::Result<()> {
    let (specs, bytes): (Vec<Spec>, Vec<&[u8]>) = tensors.into_iter().unzip();
    let (placed, _) = place(specs);
    out.write_all(&framed(header(&placed), 0))?;
    for (bytes, (spec, _)) in bytes.into_iter().zip(&placed) {
        assert_eq!(bytes.len() as u64, spec.bytes(), "bytes of {}", spec.name);
        out.write_all(bytes)?;
    }
    Ok(())
}

/// A file whose tensors come one by one, in any order.
#[derive(Debug)]
pub struct StreamWriter {
    file: File,
    placed: Vec<(Spec, u64)>,
    missing: usize,
    room: usize,
    end: u64,
}

/// The most bytes a tensor given to [`StreamWriter::append`] may have.
pub const APPENDED_MAX: usize = 4096;

impl StreamWriter {
    /// A new file with room for `specs`, laid out in this order (wider dtypes first), and for byte tensors of the
    /// names `appended` behind them, whose sizes are not known yet.
    pub fn create(path: &Path, specs: Vec<Spec>, appended: &[String]) -> io::Result<Self> {
        let (mut placed, end) = place(specs);
        let known = placed.len();
        // The longest header there could be.
        let longest = |name: &String| (Spec::new(name, FileDtype::U8, vec![APPENDED_MAX]), u64::MAX / 2);
        placed.extend(appended.iter().map(longest));
        let room = header(&placed).len().next_multiple_of(8);
        placed.truncate(known);
        Ok(Self { file: File::create(path)?, missing: known, placed, room, end })
    }

    /// Writes the data of tensor number `i` of the specs.
    pub fn put(&mut self, i: usize, bytes: &[u8]) -> io::Result<()> {
        let (spec, begin) = &self.placed[i];
        assert_eq!(bytes.len() as u64, spec.bytes(), "bytes of {}", spec.name);
        self.missing -= 1;
        self.file.write_all_at(bytes, self.data_start() + begin)
    }

    /// Adds a byte tensor behind all others.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        assert!(bytes.len() <= APPENDED_MAX, "bytes of {name}");
        self.file.write_all_at(bytes, self.data_start() + self.end)?;
        self.placed.push((Spec::new(name, FileDtype::U8, vec![bytes.len()]), self.end));
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Writes the header and syncs. The size of the data.
    pub fn finish(self) -> io::Result<u64> {
        assert_eq!(self.missing, 0, "every tensor was put");
        let header = header(&self.placed);
        assert!(header.len() <= self.room, "the header fits its room");
        self.file.write_all_at(&framed(header, self.room), 0)?;
        self.file.sync_all()?;
        Ok(self.end)
    }

    fn data_start(&self) -> u64 {
        8 + self.room as u64
    }
}

/// Splits tensors of these sizes, in order, into shards of at most `limit` bytes (a larger tensor has one of its own).
pub fn shards(sizes: &[u64], limit: u64) -> Vec<std::ops::Range<usize>> {
    let (mut ranges, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (i, size) in sizes.iter().enumerate() {
        if i > start && bytes + size > limit {
            ranges.push(start..i);
            (start, bytes) = (i, 0);
        }
        bytes += size;
    }
    ranges.push(start..sizes.len());
    ranges
}

/// "model.safetensors", or "model-00002-of-00003.safetensors".
pub fn shard_name(i: usize, count: usize) -> String {
    if count == 1 { "model.safetensors".into() } else { format!("model-{:05}-of-{count:05}.safetensors", i + 1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_safetensors_crate_reads_what_is_streamed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let specs = vec![
            Spec::new("a \"quoted\" name", FileDtype::F32, vec![3]),
            Spec::new("b", FileDtype::BF16, vec![1, 3]),
            Spec::new("c", FileDtype::U8, vec![5]),
        ];
        let late = ["late".to_owned(), "later".to_owned()];
        let mut w = StreamWriter::create(&path, specs, &late).unwrap();
        w.put(2, b"hello").unwrap();
        w.append("later", b"12").unwrap();
        w.put(0, &[1; 12]).unwrap();
        w.append("late", b"1").unwrap();
        w.put(1, &[2; 6]).unwrap();
        assert_eq!(w.finish().unwrap(), 26);
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 5);
        assert_eq!(file.tensor("a \"quoted\" name").unwrap().data(), [1; 12]);
        assert_eq!(file.tensor("b").unwrap().shape(), [1, 3]);
        assert_eq!(file.tensor("c").unwrap().data(), b"hello");
        assert_eq!(file.tensor("later").unwrap().data(), b"12");
        super::super::SafeTensors::open(&path).unwrap();
    }

    #[test]
    fn the_safetensors_crate_reads_what_is_written_at_once() {
        let mut out = Vec::new();
        let a = (Spec::new("a", FileDtype::F32, vec![2]), &[7u8; 8][..]);
        write_to(&mut out, vec![a, (Spec::new("b", FileDtype::U8, vec![0]), &[][..])]).unwrap();
        let file = safetensors::SafeTensors::deserialize(&out).unwrap();
        assert_eq!(file.tensor("a").unwrap().data(), [7; 8]);
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&out).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    }

    #[test]
    fn shards_hold_at_most_their_limit() {
        assert_eq!(shards(&[1, 2, 3], 10), std::slice::from_ref(&(0..3)));
        assert_eq!(shards(&[4, 4, 4], 8), [0..2, 2..3]);
        assert_eq!(shards(&[9, 1, 9], 5), [0..1, 1..2, 2..3]);
        assert_eq!(
            (shard_name(0, 1), shard_name(1, 3)),
            ("model.safetensors".into(), "model-00002-of-00003.safetensors".into())
        );
    }
}
