//! One picture out of a buffer, and into a PNG file.
//!
//! It knows leases and pixels, not how a buffer was found. The lease ends before anything is
//! written, so that a slow disk keeps nobody waiting.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use bufshare::host::client::{Access, Buffer, Client, Lease};
use bufshare::host::image::Image;
use bufshare::host::wire::FdKind;
use bufshare::ioctl::{DmaBufSync, Mapping, dma_buf_sync};
use bufshare::protocol::{Mode, access};

use crate::Failure;

/// Pixels as R, G, B and perhaps A, line after line.
pub struct Picture {
    pub image: Image,
    pub pixels: Vec<u8>,
    pub alpha: bool,
    pub generation: u64,
    pub mode: Mode,
}

/// Takes a READ lease, a stable view within `timeout`, and the pixels.
pub fn read(client: &mut Client, buffer: &Buffer, timeout: Duration) -> Result<Picture, Failure> {
    let lease = client.acquire(buffer.uuid, access::READ, false)?;
    let (id, mode) = (lease.id, lease.mode);
    let picture =
        client.begin(id, Access::READ, timeout).map_err(Failure::from).and_then(|generation| {
            let (image, pixels, alpha) = copy_out(&lease)?;
            Ok(Picture { image, pixels, alpha, generation, mode })
        });
    let ended = client.end(id, Access::READ).and_then(|_| client.release(lease));
    let picture = picture?;
    ended?;
    Ok(picture)
}

fn copy_out(lease: &Lease) -> Result<(Image, Vec<u8>, bool), Failure> {
    let buffer = &lease.buffer;
    let bad = |source| Failure::Image { name: buffer.name.clone(), source };
    let failed = |what: &str| {
        let what = format!("{what} buffer {}", buffer.uuid);
        move |source| Failure::Io { what, source }
    };
    let image = Image::parse(buffer.metadata_type, &lease.metadata, buffer.size).map_err(bad)?;
    let format = image.readable().map_err(bad)?;
    let len = usize::try_from(buffer.size).map_err(|e| failed("map")(io::Error::other(e)))?;
    let map = Mapping::new(&lease.fd, len, false).map_err(failed("map"))?;

    let sync = |end| match lease.fd_kind {
        FdKind::DmaBuf => {
            dma_buf_sync(lease.fd.as_fd(), DmaBufSync { end, read: true, write: false })
        }
        FdKind::MemFd => Ok(()),
    };
    sync(false).map_err(failed("sync"))?;
    let plane = image.planes[0];
    let mut line = vec![0; format.line_bytes(image.width) as usize];
    let mut pixels = Vec::new();
    for y in 0..image.height as usize {
        let at = plane.offset as usize + y * plane.stride as usize;
        map.read_at(at, &mut line).map_err(failed("read"))?;
        format.unpack(&line, &mut pixels);
    }
    sync(true).map_err(failed("sync"))?;
    Ok((image, pixels, format.has_alpha()))
}

/// Writes a PNG file; `-` is standard output.
pub fn write(picture: &Picture, path: &Path) -> Result<(), Failure> {
    let file = path.display().to_string();
    let sink: Box<dyn Write> = if path.as_os_str() == "-" {
        Box::new(io::stdout().lock())
    } else {
        let what = format!("create {file}");
        Box::new(File::create(path).map_err(|source| Failure::Io { what, source })?)
    };
    let mut encoder =
        png::Encoder::new(BufWriter::new(sink), picture.image.width, picture.image.height);
    encoder.set_color(if picture.alpha { png::ColorType::Rgba } else { png::ColorType::Rgb });
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    encoder
        .write_header()
        .and_then(|mut writer| {
            writer.write_image_data(&picture.pixels)?;
            writer.finish()
        })
        .map_err(|source| Failure::Png { file, source })
}
