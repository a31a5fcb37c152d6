//! Lends the content of a file to VMs, until it is interrupted.
//!
//! It knows files and memory of this host, not what VMs do with it.

use std::fs::{self, File};
use std::io::{self, Cursor};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bufshare::host::client::{Access, Client, Event, Export, Loan};
use bufshare::host::image::{Format, ImageError};
use bufshare::ioctl::{DmaBufSync, Mapping, dma_buf_sync, ioctl_new_fd, iowr};
use bufshare::limits::GRANULE;
use bufshare::protocol::{Image, access, metadata};
use clap::{Args, ValueEnum};
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde_json::json;
use zerocopy::IntoBytes;

use crate::{Failure, print, show};

/// What the VMs may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rights {
    /// Read.
    R,
    /// Read and write.
    Rw,
}

/// What to lend, and to whom.
#[derive(Debug, Args)]
pub struct Wish {
    /// A PNG picture, or anything else as it is.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// A VM's name, or `*` for all that may have buffers of the host; repeats.
    #[arg(long, required = true, value_name = "VM")]
    to: Vec<String>,
    /// What they may do.
    #[arg(long, value_enum, default_value_t = Rights::R)]
    access: Rights,
    /// What the buffer is called; else as the file.
    #[arg(long)]
    name: Option<String>,
    /// What the bytes of FILE are, where it is no PNG picture: lines of pixels, without gaps.
    #[arg(long, value_name = "WIDTHxHEIGHT:FOURCC", value_parser = parse_image)]
    image: Option<Image>,
    /// Take the memory from /dev/dma_heap/NAME (`system` is one) rather than a memfd.
    #[arg(long, value_name = "NAME")]
    dma_heap: Option<String>,
}

fn parse_image(text: &str) -> Result<Image, String> {
    let parts = || {
        let (size, code) = text.split_once(':')?;
        let (width, height) = size.split_once('x')?;
        let code: [u8; 4] = format!("{code:<4}").as_bytes().try_into().ok()?;
        Some((width.parse().ok()?, height.parse().ok()?, u32::from_le_bytes(code)))
    };
    let (width, height, fourcc) = parts().ok_or("say it as 640x480:XR24")?;
    describe(width, height, fourcc).ok_or_else(|| "a format that is not known here".to_owned())
}

fn describe(width: u32, height: u32, fourcc: u32) -> Option<Image> {
    let stride = u32::try_from(Format::find(fourcc)?.line_bytes(width)).ok()?;
    let mut image = Image {
        fourcc: fourcc.into(),
        nr_planes: 1.into(),
        width: width.into(),
        height: height.into(),
        ..Default::default()
    };
    image.planes[0].stride = stride.into();
    Some(image)
}

fn failed(what: String) -> impl FnOnce(io::Error) -> Failure {
    move |source| Failure::Io { what, source }
}

/// The bytes of a file, and what they are.
fn read(path: &Path, image: Option<Image>) -> Result<(Vec<u8>, Option<Image>), Failure> {
    let file = path.display().to_string();
    let bytes = fs::read(path).map_err(failed(format!("read {file}")))?;
    if !bytes.starts_with(b"\x89PNG") || image.is_some() {
        return Ok((bytes, image));
    }
    let bad = |error: png::DecodingError| failed(format!("read {file}"))(io::Error::other(error));
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    let all = png::Transformations::normalize_to_color8() | png::Transformations::ALPHA;
    decoder.set_transformations(all);
    let mut reader = decoder.read_info().map_err(bad)?;
    let alpha = matches!(reader.info().color_type, png::ColorType::Rgba);
    let no_size = || failed(format!("read {file}"))(io::Error::other("a picture too large"));
    let mut pixels = vec![0; reader.output_buffer_size().ok_or_else(no_size)?];
    let info = reader.next_frame(&mut pixels).map_err(bad)?;
    if info.color_type != png::ColorType::Rgba {
        return Err(failed(format!("read {file}"))(io::Error::other("a picture without colours")));
    }
    for pixel in pixels.chunks_exact_mut(4) {
        pixel.swap(0, 2);
    }
    let fourcc = u32::from_le_bytes(if alpha { *b"AR24" } else { *b"XR24" });
    let bad = || Failure::Image { name: file.clone(), source: ImageError::Format(fourcc) };
    Ok((pixels, Some(describe(info.width, info.height, fourcc).ok_or_else(bad)?)))
}

/// Memory of whole pages that holds these bytes and cannot change its size.
fn sealed_memfd(bytes: &[u8], size: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create("bufsharectl", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(size)?;
    file.write_all_at(bytes, 0)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

fn of_heap(name: &str, bytes: &[u8], size: u64) -> io::Result<OwnedFd> {
    let heap =
        File::options().read(true).write(true).open(Path::new("/dev/dma_heap").join(name))?;
    // struct dma_heap_allocation_data: length; fd and its flags; flags of the heap.
    let flags = u64::from((OFlags::RDWR | OFlags::CLOEXEC).bits());
    let mut arg = [size, flags << 32, 0];
    let fd = ioctl_new_fd(heap.as_fd(), iowr(b'H', 0, 24), &mut arg, 8)?;
    let len = usize::try_from(size).map_err(io::Error::other)?;
    let map = Mapping::new(&fd, len, true)?;
    let sync = |end| dma_buf_sync(fd.as_fd(), DmaBufSync { end, read: false, write: true });
    sync(false)?;
    map.write_at(0, bytes)?;
    sync(true)?;
    Ok(fd)
}

/// The numbers of the peers that are meant.
fn peers(client: &mut Client, names: &[String]) -> Result<Vec<u32>, Failure> {
    let known = client.peers()?;
    let find = |name: &String| {
        let found = known.iter().find(|peer| peer.name == *name).map(|peer| peer.id);
        let any = (name == "*").then_some(bufshare::protocol::peer::ANY);
        found.or(any).ok_or_else(|| Failure::NoVm(name.clone()))
    };
    names.iter().map(find).collect()
}

/// Lends it, and tells what becomes of it. Returns when nobody reads that any more; what is lent ends
/// with this process.
pub fn run(client: &mut Client, wish: &Wish, as_json: bool) -> Result<(), Failure> {
    let (bytes, image) = read(&wish.file, wish.image)?;
    let peers = peers(client, &wish.to)?;
    let size = (bytes.len().max(1) as u64).next_multiple_of(GRANULE);
    let memory = match &wish.dma_heap {
        Some(heap) => {
            of_heap(heap, &bytes, size).map_err(failed(format!("get memory of heap {heap}")))?
        }
        None => sealed_memfd(&bytes, size).map_err(failed("make a memfd".to_owned()))?,
    };
    let file = wish.file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bits = match wish.access {
        Rights::R => access::READ,
        Rights::Rw => access::READ | access::WRITE,
    };
    let loan = Loan {
        size,
        access: bits,
        name: wish.name.as_ref().unwrap_or(&file),
        metadata_type: image.map_or(metadata::NONE, |_| metadata::IMAGE),
        metadata: image.as_ref().map_or(&[], IntoBytes::as_bytes),
    };
    let Export { handle, uuid, fd_kind } = client.export(&memory, &loan)?;
    for peer in peers {
        client.grant(handle, peer, bits, 0, Duration::ZERO)?;
    }
    // What is in it is complete.
    client.end(handle, Access::WRITE)?;
    let (name, kind, to) = (loan.name, fd_kind.name(), wish.to.join(", "));
    let text = if as_json {
        let value = json!({ "event": "exported", "uuid": uuid.to_string(), "name": name,
                            "size": size, "fd_kind": kind, "to": wish.to });
        format!("{value}\n")
    } else {
        format!("exported   {uuid}  {name:?} to {to}, {size} bytes, {kind}; until interrupted\n")
    };
    let mut read = print(&text)?;
    while read {
        let event = client.next_event(None)?;
        if let Some(event @ (Event::Busy(_) | Event::Idle(_) | Event::Changed(_))) = event {
            read = print(&show::event(&event, as_json))?;
        }
    }
    Ok(())
}
