//! A safetensors file, memory-mapped, every claim of its header checked before a byte is used.
//!
//! The format (<https://github.com/huggingface/safetensors#format>): 8 bytes of header length, a JSON header, the data.
//! The `safetensors` crate reads it too, but its errors name neither file nor place, and of two tensors with one name
//! it keeps the last.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::{Bound, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, UncheckedAdvice};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

pub use safetensors::Dtype as FileDtype;

use crate::error::{Error, Result};
use crate::tensor::{Dtype, HostTensor};

/// The limit of the safetensors library: a longer header is refused unread.
pub const MAX_HEADER: u64 = 100_000_000;

/// Bytes of one MADV_WILLNEED. Of a longer one the kernel reads no more than the disk takes at a time (max_sectors_kb), and
/// shorter ones are slower; so are page faults alone, and threads that read the file ahead of the map (bench load).
const WILL_NEED: usize = 512 << 10;

/// One tensor of a header.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub dtype: FileDtype,
    pub shape: Vec<usize>,
    /// Its bytes, counted from the start of the file.
    pub range: Range<usize>,
}

/// A checked header: names in alphabetical order, ranges inside the file, disjoint and without gaps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Header {
    pub entries: BTreeMap<String, Entry>,
    pub metadata: BTreeMap<String, String>,
}

/// A tensor inside a mapped file.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub dtype: FileDtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// One open file.
#[derive(Clone, Debug)]
pub struct SafeTensors {
    path: PathBuf,
    map: Arc<Mmap>,
    header: Header,
}

impl SafeTensors {
    /// Maps `path` and checks its header. Errors: unreadable, truncated, oversized or malformed header, unknown dtype,
    /// a name twice, a byte count that is not shape × dtype, tensors that overlap, leave gaps or leave the file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::read("open", path))?;
        let kind = file.metadata().map_err(Error::read("stat", path))?;
        if !kind.is_file() {
            return Err(Error::input(path, "file", "something that is not a regular file", "a safetensors file"));
        }
        // SAFETY: the map is read-only. Should another process truncate the file while we read it, the kernel ends this
        // process with SIGBUS; that is the known price of mapping weights, the same as in every safetensors reader.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::read("map", path))?;
        let header = parse(path, &map)?;
        Ok(Self { path: path.into(), map: Arc::new(map), header })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensor names, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.entries.keys().map(String::as_str)
    }

    /// The strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    pub fn contains(&self, name: &str) -> bool {
        self.header.entries.contains_key(name)
    }

    /// Dtype, shape and place of a tensor. Errors: no such tensor.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        self.header.entries.get(name).ok_or_else(|| {
            Error::input(&self.path, format!("tensor {name}"), "no such tensor", "a tensor of this name")
        })
    }

    /// A tensor and what belongs to it by name: of a weight in 4 bits `NAME.absmax` and the like.
    pub fn parts<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Entry> {
        let from = self.header.entries.range::<str, _>((Bound::Included(name), Bound::Unbounded));
        from.take_while(move |(n, _)| n.starts_with(name)).map(|(_, e)| e)
    }

    /// A tensor of any dtype. Errors: no such tensor.
    pub fn get(&self, name: &str) -> Result<View<'_>> {
        let e = self.entry(name)?;
        Ok(View { dtype: e.dtype, shape: &e.shape, bytes: &self.map[e.range.clone()] })
    }

    /// A tensor of 16 or 32-bit floats, not copied. Errors: no such tensor, another dtype.
    pub fn dense(&self, name: &str) -> Result<HostTensor> {
        let e = self.entry(name)?;
        let dtype = dense_dtype(e.dtype).ok_or_else(|| {
            Error::input(&self.path, format!("tensor {name}"), format!("dtype {}", e.dtype), "dtype BF16, F16 or F32")
        })?;
        Ok(HostTensor::mapped(dtype, e.shape.clone(), self.map.clone(), e.range.clone()))
    }

    /// Tells the kernel that a tensor and its parts will be read, so that the disk is busy before a page is touched.
    pub fn will_need(&self, name: &str) {
        for e in self.parts(name) {
            for start in e.range.clone().step_by(WILL_NEED) {
                let len = WILL_NEED.min(e.range.end - start);
                // Advice only: where it fails the pages come as they are touched.
                let _ = self.map.advise_range(memmap2::Advice::WillNeed, start, len);
            }
        }
    }

    /// Gives back the pages of a tensor that has been read, so that weights copied elsewhere do not stay resident.
    pub fn release(&self, name: &str) {
        if let Some(e) = self.header.entries.get(name) {
            // SAFETY: the map is a read-only view of a file. MADV_DONTNEED drops its pages from this process; whoever
            // touches one again (a neighbour on the same page, too) gets the same bytes from the file.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, e.range.start, e.range.len()) };
        }
    }
}

/// The dtype of weights and adapters, or None for any other.
pub fn dense_dtype(dtype: FileDtype) -> Option<Dtype> {
    match dtype {
        FileDtype::F32 => Some(Dtype::F32),
        FileDtype::BF16 => Some(Dtype::Bf16),
        FileDtype::F16 => Some(Dtype::F16),
        _ => None,
    }
}

/// The inverse of [`dense_dtype`].
pub fn file_dtype(dtype: Dtype) -> FileDtype {
    match dtype {
        Dtype::F32 => FileDtype::F32,
        Dtype::Bf16 => FileDtype::BF16,
        Dtype::F16 => FileDtype::F16,
    }
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header as written, in file order, duplicates kept.
#[derive(Default)]
struct RawHeader {
    tensors: Vec<(String, RawEntry)>,
    metadata: Option<BTreeMap<String, String>>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<RawHeader, M::Error> {
                let mut header = RawHeader::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Checks the bytes of a whole file; `path` only names it in errors. See [`SafeTensors::open`] for what is refused.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Header> {
    let fault = |place: &str, found: String, expected: String| Error::input(path, place, found, expected);
    let Some((length, _)) = bytes.split_first_chunk::<8>() else {
        return Err(fault("header length", format!("{} bytes in all", bytes.len()), "at least 8 bytes".into()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(fault("header length", format!("{length} bytes"), format!("at most {MAX_HEADER} bytes")));
    }
    let data_start = 8 + length as usize;
    if data_start > bytes.len() {
        let found = format!("a header of {length} bytes in a file of {}", bytes.len());
        return Err(fault("header length", found, "a header inside the file (is it truncated?)".into()));
    }
    let text = std::str::from_utf8(&bytes[8..data_start])
        .map_err(|e| fault("header", format!("bytes that are not UTF-8 ({e})"), "JSON".into()))?;
    let raw: RawHeader = serde_json::from_str(text)
        .map_err(|e| fault("header", format!("malformed JSON ({e})"), "a JSON object of tensors".into()))?;
    check(path, raw, data_start, bytes.len())
}

fn check(path: &Path, raw: RawHeader, data_start: usize, file_len: usize) -> Result<Header> {
    let data_len = (file_len - data_start) as u64;
    let mut entries = BTreeMap::new();
    for (name, e) in raw.tensors {
        let fault = |found: String, expected: String| Error::input(path, format!("tensor {name}"), found, expected);
        let dtype = FileDtype::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(&e.dtype))
            .map_err(|_| fault(format!("dtype {:?}", e.dtype), "a dtype of safetensors".into()))?;
        let (begin, end) = e.data_offsets;
        if begin > end {
            return Err(fault(format!("data_offsets [{begin}, {end}]"), "a begin that is not past the end".into()));
        }
        if end > data_len {
            let found = format!("data_offsets [{begin}, {end}] in {data_len} bytes of data");
            return Err(fault(found, "offsets inside the file (is it truncated?)".into()));
        }
        let bits = e.shape.iter().try_fold(dtype.bitsize() as u64, |n, &d| n.checked_mul(d));
        match bits {
            Some(bits) if bits % 8 == 0 && bits / 8 == end - begin => {}
            Some(bits) => {
                let found = format!("{} bytes of data", end - begin);
                return Err(fault(found, format!("{} bytes for {dtype} {:?}", bits.div_ceil(8), e.shape)));
            }
            None => return Err(fault(format!("shape {:?}", e.shape), "a shape that fits in memory".into())),
        }
        let range = data_start + begin as usize..data_start + end as usize;
        let shape = e.shape.iter().map(|&d| d as usize).collect();
        if entries.contains_key(&name) {
            return Err(fault("the same name twice".into(), "each tensor once".into()));
        }
        entries.insert(name, Entry { dtype, shape, range });
    }
    check_cover(path, &entries, data_start, file_len)?;
    Ok(Header { entries, metadata: raw.metadata.unwrap_or_default() })
}

/// Tensors must cover the data exactly: no byte twice, none unused.
fn check_cover(path: &Path, entries: &BTreeMap<String, Entry>, data_start: usize, file_len: usize) -> Result<()> {
    let mut by_place: Vec<(&String, &Entry)> = entries.iter().collect();
    by_place.sort_by_key(|(_, e)| (e.range.start, e.range.end));
    let (mut end, mut previous) = (data_start, "the header");
    for (name, e) in by_place {
        let start = e.range.start;
        if start < end {
            let found = format!("data from byte {start}, inside that of {previous}, which ends at {end}");
            return Err(Error::input(path, format!("tensor {name}"), found, "tensors that do not overlap"));
        }
        if start > end {
            let found = format!("{} unused bytes between it and {previous}", start - end);
            return Err(Error::input(path, format!("tensor {name}"), found, "tensors without gaps between them"));
        }
        (end, previous) = (e.range.end, name);
    }
    if end != file_len {
        let found = format!("{} bytes after the last tensor", file_len - end);
        return Err(Error::input(path, "end of file", found, "the file to end with the last tensor"));
    }
    Ok(())
}
